"""The GPU tests, as far as they can be tried without a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.test_imports import WITHOUT

TESTS = Path(__file__).parent
# What a machine that is lent with a GPU may lack, and the GPU tests that need it.
NEEDS = {
    "ignite": {"test_handler.py", "test_ignite_suite.py"},
    "safetensors": {"test_files.py"},
    "tqdm": {"test_bench.py"},
}
ABSENT = (*NEEDS, "diffusers", "ema_pytorch", "matplotlib", "sklearn", "tensorboardX", "xdist")


def pytest_prints(*arguments: str, without: tuple[str, ...] = ()) -> str:
    program = "import sys, pytest; sys.exit(pytest.main(['-p', 'no:cacheprovider', *sys.argv[1:]]))"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(names=without) + program, *arguments],
        cwd=TESTS.parent,
        # Else pytest loads the plugin of xdist, which is among those that are absent.
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def collected(*arguments: str, without: tuple[str, ...] = ()) -> set[str]:
    command = ("-m", "gpu", "--collect-only", "-q", *arguments)
    found = pytest_prints(*command, without=without).splitlines()
    return {line for line in found if line.startswith("tests/")}


def test_gpu_tests_are_collected_without_the_packages_that_they_do_not_need() -> None:
    files = {
        path.name
        for path in TESTS.glob("test_*.py")
        if re.search(r"pytest\.mark\.gpu", path.read_text())
    }
    without = {name for names in NEEDS.values() for name in names}
    assert without < files
    expected = collected(*(f"tests/{name}" for name in files - without))
    assert len(expected) > 100
    assert collected("tests", without=ABSENT) == expected
