"""The demo as a user runs it: what it prints, draws and saves, and that it goes on after Ctrl-C."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    folder = tmp_path_factory.mktemp("whole")
    done = run(folder, "--epochs=4")
    assert "EMA backend: foreach (" in done.stdout
    return folder, epochs(done)


def test_it_learns_and_the_ema_is_better(whole: tuple[Path, list]) -> None:
    _, lines = whole
    assert [number for number, *_ in lines] == [1, 2, 3, 4]
    # Chance is 0.1; the seed and the threads' arithmetic vary the rest.
    assert lines[-1][1] > 0.7
    assert lines[-1][2] > 0.9
    assert [momentum for *_, momentum in lines] == ["0.1360", "0.0711", "0.0100", "0.0100"]


def test_the_picture_shows_something(whole: tuple[Path, list]) -> None:
    pixels = image.imread(whole[0] / "digits.png")
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 600
    assert 0.01 < (pixels[..., :3].min(axis=-1) < 0.9).mean() < 0.5


def test_the_checkpoint_is_plain(whole: tuple[Path, list]) -> None:
    state = torch.load(whole[0] / "checkpoint_4.pt", weights_only=True)
    assert {"model", "optimizer", "trainer", "ema", "history"} <= state.keys()
    assert state["ema"]["update_index"] == len(state["history"]["momentum"]) > 4 * 60


def test_a_resumed_run_equals_an_uncut_one(whole: tuple[Path, list], tmp_path: Path) -> None:
    first = epochs(run(tmp_path, "--epochs=2"))
    second = epochs(run(tmp_path, "--epochs=4", "--resume"))
    assert first + second == whole[1]
    uncut, cut = (
        torch.load(folder / "checkpoint_4.pt", weights_only=True) for folder in (whole[0], tmp_path)
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
            while not (tmp_path / "checkpoint_1.pt").exists():
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.05)
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
