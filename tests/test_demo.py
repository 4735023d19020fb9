"""The demo as a user runs it: what it prints, draws and saves, and that it goes on after Ctrl-C."""

import contextlib
import fcntl
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("ignite")
pytest.importorskip("sklearn")
image = pytest.importorskip("matplotlib.image")

DEMO = Path(__file__).parent.parent / "examples" / "digits.py"
LINE = re.compile(r"epoch +(\d+) +online (0\.\d+) +EMA (0\.\d+) +momentum (\d\.\d+)")


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(DEMO), "--device=cpu", f"--output={folder}", *arguments]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *arguments), capture_output=True, text=True, check=False)


def epochs(done: subprocess.CompletedProcess[str]) -> list[tuple[int, float, float, str]]:
    assert done.returncode == 0, done.stderr
    return [
        (int(n), float(o), float(e), m) for n, o, e, m in LINE.findall(done.stdout + done.stderr)
    ]


class Whole(NamedTuple):
    folder: Path
    lines: list[tuple[int, float, float, str]]
    printed: str


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    done = run(folder, "--epochs=4")
    assert done.stderr == ""
    return Whole(folder, epochs(done), done.stdout)


def on_a_terminal(*command: str) -> str:
    """What a command writes to a terminal of 100 columns."""
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("4H", 30, 100, 0, 0))
    parts = []
    with subprocess.Popen(command, stdin=there, stdout=there, stderr=there) as process:
        os.close(there)
        # Linux says that the other end is closed by an error.
        with contextlib.suppress(OSError), os.fdopen(here, "rb", buffering=0) as output:
            while part := output.read(1 << 16):
                parts.append(part)
    assert process.returncode == 0, parts
    return b"".join(parts).decode().replace("\r\n", "\n")


def test_a_pipe_gets_a_line_per_epoch_and_no_bar(whole: Whole) -> None:
    first, *lines = whole.printed.splitlines()
    assert first.startswith("EMA backend: foreach (")
    assert [bool(LINE.fullmatch(line)) for line in lines[:5]] == [True] * 4 + [False]
    assert len(lines) <= 4 + 8
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", whole.printed)  # all but the end of a line


def test_a_terminal_gets_the_bar(tmp_path: Path) -> None:
    printed = on_a_terminal(*command(tmp_path, "--epochs=2"))
    assert len(re.findall(r"\rEpoch \[1/2\]: \[\d+/68\] +\d+%\|.*?loss=", printed)) > 2
    # Each epoch's line stands alone, the bar having been wiped from it.
    lines = [line.rpartition("\r")[2] for line in printed.splitlines()]
    assert [int(match[1]) for line in lines if (match := LINE.fullmatch(line))] == [1, 2]
    assert "%|" not in lines[-1]


def test_the_last_lines_say_what_was_made_and_how_to_go_on(whole: Whole, tmp_path: Path) -> None:
    end = whole.printed[whole.printed.index("Made") :]
    for made in ("digits.png", "checkpoint_4.pt"):
        assert f"{whole.folder / made}" in end
        assert (whole.folder / made).exists()
    for page in re.findall(r"[\w/]+\.md|docs/", end):
        assert (DEMO.parent.parent / page).exists(), page
    # The command runs as it is printed, and goes on.
    (again,) = re.findall(r"^ *(\S+ .*--resume.*)$", end, re.MULTILINE)
    copy = tmp_path / "copy"
    shutil.copytree(whole.folder, copy)
    again = again.replace(str(whole.folder), str(copy))
    log = tmp_path / "log"
    assert on_a_terminal("/bin/sh", "-c", f"{again} > {log}") == ""  # half a terminal has no bar
    assert [int(number) for number, *_ in LINE.findall(log.read_text())] == [5, 6, 7, 8]
    assert f"resumed from {copy / 'checkpoint_4.pt'}" in log.read_text()


def test_it_learns_and_the_ema_is_better(whole: Whole) -> None:
    lines = whole.lines
    assert [number for number, *_ in lines] == [1, 2, 3, 4]
    # Chance is 0.1; the seed and the threads' arithmetic vary the rest.
    assert lines[-1][1] > 0.7
    assert lines[-1][2] > 0.9
    assert [momentum for *_, momentum in lines] == ["0.1360", "0.0711", "0.0100", "0.0100"]


def test_the_picture_shows_something(whole: Whole) -> None:
    pixels = image.imread(whole.folder / "digits.png")
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 600
    assert 0.01 < (pixels[..., :3].min(axis=-1) < 0.9).mean() < 0.5


def test_the_checkpoint_is_plain(whole: Whole) -> None:
    state = torch.load(whole.folder / "checkpoint_4.pt", weights_only=True)
    assert {"model", "optimizer", "trainer", "ema", "history"} <= state.keys()
    assert state["ema"]["update_index"] == len(state["history"]["momentum"]) > 4 * 60


def test_a_resumed_run_equals_an_uncut_one(whole: Whole, tmp_path: Path) -> None:
    first = epochs(run(tmp_path, "--epochs=2"))
    second = epochs(run(tmp_path, "--epochs=4", "--resume"))
    assert first + second == whole.lines
    uncut, cut = (
        torch.load(folder / "checkpoint_4.pt", weights_only=True)
        for folder in (whole.folder, tmp_path)
    )
    for name, tensor in uncut["ema"]["weights"].items():
        assert torch.equal(cut["ema"]["weights"][name], tensor), name
    assert cut["history"] == uncut["history"]


def test_ctrl_c_leaves_a_usable_checkpoint(tmp_path: Path) -> None:
    arguments = command(tmp_path, "--epochs=1000")
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "checkpoint_2.pt").exists():
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.05)
            os.set_blocking(process.stdout.fileno(), False)
            so_far = os.read(process.stdout.fileno(), 1 << 16).decode()
            os.set_blocking(process.stdout.fileno(), True)
            assert LINE.search(so_far)  # a log has each line once its epoch has ended
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Interrupted: --resume goes on from" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    done = max(int(path.stem.rpartition("_")[2]) for path in tmp_path.glob("checkpoint_*.pt"))
    lines = epochs(run(tmp_path, f"--epochs={done + 1}", "--resume"))
    assert [number for number, *_ in lines] == [done + 1]


def test_mistakes_are_explained(tmp_path: Path) -> None:
    for arguments, text in (
        (["--resume"], "there is no checkpoint in"),
        (["--backend=cuda"], "invalid choice: 'cuda'"),
        (["--epochs=0"], "must be at least 1"),
    ):
        done = run(tmp_path, *arguments)
        assert done.returncode == 2
        assert text in done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_says_what_it_installs_before_it_does(tmp_path: Path) -> None:
    def steps(*files: str) -> str:
        for file in files:
            (tmp_path / file).touch()
        make = [
            "make",
            "--dry-run",
            "--no-print-directory",
            "demo",
            f"VENV={tmp_path}",
            f"PYTHON={sys.executable}",
        ]
        done = subprocess.run(make, cwd=DEMO.parents[1], capture_output=True, text=True, check=True)
        return done.stdout

    fresh = steps()
    said, installed = fresh.index("2 GB"), fresh.index("pip install")
    assert said < fresh.index("half a minute") < installed < fresh.index("examples/digits.py")
    # A control: where all is installed, nothing is said or done but the demo.
    assert steps(".installed").strip() == f"{tmp_path}/bin/python examples/digits.py"
