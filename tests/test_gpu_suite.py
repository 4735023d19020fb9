"""The GPU tests, as far as they can be tried without a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.test_imports import WITHOUT

TESTS = Path(__file__).parent
# What a machine that is lent with a GPU may lack, and the GPU tests that need it.
NEEDS = {
    "ignite": {"test_handler_models.py", "test_ignite_suite.py"},
    "safetensors": {"checkpoint/test_files.py"},
    "tqdm": {"test_bench.py"},
}
ABSENT = (
    *NEEDS,
    *("accelerate", "diffusers", "ema_pytorch", "lightning", "matplotlib", "peft", "sklearn"),
    *("tensorboardX", "transformers", "xdist"),
)


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests themselves run here")


def pytest_prints(*arguments: str, without: tuple[str, ...] = (), status: int = 0) -> str:
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
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def collected(*arguments: str, without: tuple[str, ...] = ()) -> set[str]:
    command = ("-m", "gpu", "--collect-only", "-q", *arguments)
    found = pytest_prints(*command, without=without).splitlines()
    return {line for line in found if line.startswith("tests/")}


# Files with GPU tests.
FILES = {
    path.relative_to(TESTS).as_posix()
    for path in TESTS.rglob("test_*.py")
    if re.search(r"pytest\.mark\.gpu", path.read_text())
}


def test_gpu_tests_are_collected_without_the_packages_that_they_do_not_need() -> None:
    without = {name for names in NEEDS.values() for name in names}
    assert without < FILES
    expected = collected(*(f"tests/{name}" for name in FILES - without))
    assert len(expected) > 100
    assert collected("tests", without=ABSENT) == expected


@NO_GPU
def test_gpu_tests_pass_where_a_cpu_can_stand_in() -> None:
    options = ("-p", "tests.standin", "--one-each", "-m", "gpu", "-ra")
    printed = pytest_prints(*options, *(f"tests/{name}" for name in FILES))
    (passed,) = re.findall(r"(\d+) passed", printed)
    assert int(passed) >= 15, printed


STANDING_IN = """
import pytest
import torch

pytestmark = pytest.mark.gpu

def test_names():
    assert torch.nn.Linear(2, 2).cuda().to("cuda:0").weight.device.type == "cpu"
    assert torch.ones(2, device="cuda").to(torch.device("cuda", 0)).sum() == 2
    assert torch.rand(2, generator=torch.Generator("cuda"), device="cuda").device.type == "cpu"

def test_streams():
    torch.cuda.Stream()

def test_sums():
    assert torch.ones(2, device="cuda").sum() == 3
"""


@NO_GPU
def test_standing_in_finds_what_is_wrong_and_skips_what_it_is_not(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(STANDING_IN)
    printed = pytest_prints("-p", "tests.standin", "-ra", str(tmp_path), status=1)
    assert "1 failed, 1 passed, 1 skipped" in printed
    assert "assert tensor(2.) == 3" in printed
    assert "needs CUDA streams" in printed
