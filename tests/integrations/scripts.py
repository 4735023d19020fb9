"""Scripts that users run: the examples, and those of the documentation's pages."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"


def run_here(monkeypatch: pytest.MonkeyPatch, name: str, *options: object) -> dict[str, object]:
    """Run an example in this process, which has imported what it needs; the names it leaves."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def run_blocks(page: str) -> dict[str, object]:
    """Run a page's blocks of Python one after the other, and return the names they leave."""
    names: dict[str, object] = {"__name__": "__main__"}
    for block in python_blocks(page):
        exec(compile(block, page, "exec"), names)
    return names


def python_blocks(page: str) -> list[str]:
    """The blocks of Python in a page of the documentation."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    assert found, page
    return found


def run(*command: object, ends_with: str) -> str:
    """Run Python with these arguments, and return what it printed, which must have that text."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        printed, errors = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks then
        printed, errors = process.communicate(timeout=60)
    # Not the exit status: see the end of elastic_training.py.
    assert ends_with in printed, printed + errors
    return printed


def torchrun(ranks: int, script: Path, *options: object, ends_with: str) -> str:
    """Run a script on several ranks of this machine."""
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
    return run(*launcher, script, *options, ends_with=ends_with)
