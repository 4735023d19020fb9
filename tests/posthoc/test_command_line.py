"""`python -m ema_triton`: what it prints, and its exit status."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")

import safetensors.torch

from ema_triton import EMABank, PowerFunction
from ema_triton.posthoc import Snapshots, merging
from ema_triton.posthoc.__main__ import main


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    for step in (1, 2, 3):
        state = {"w": torch.full((2,), float(step)), "count": torch.tensor(step)}
        torch.save(state, tmp_path / f"{step}.pt")
    return [str(tmp_path / f"{step}.pt") for step in (1, 2, 3)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ema_triton", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_merging(paths: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    done = run("merge", "--shape", "1-sqrt", *paths, "--out", out)
    assert done.returncode == 0, done.stderr
    a, b, c = paths
    assert done.stdout.splitlines() == [
        f"0.57735     {a}",
        f"0.239146    {b}",
        f"0.183503    {c}",
        f"written: {out}",
    ]
    assert done.stderr == ""  # the progress is for terminals
    weights = safetensors.torch.load_file(out)
    expected = 0.5773502692 + 2 * 0.2391463117 + 3 * 0.1835034191
    assert weights["w"].tolist() == pytest.approx([expected] * 2)


def test_an_error_is_its_text_and_status_1(paths: list[str], tmp_path: Path) -> None:
    done = run("merge", *paths, tmp_path / "gone.pt", "--out", tmp_path / "out")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        f"error: [Errno 2] No such file or directory: '{tmp_path / 'gone.pt'}'\n"
    )
    assert not (tmp_path / "out").exists()


def test_coefficients_and_dtype(paths: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--coefficients", "0.25,0.25,0.5", "--dtype", "bfloat16", "--out", str(out))
    assert main(["merge", *paths, *options]) == 0
    weights = safetensors.torch.load_file(out)
    assert weights["w"].dtype == torch.bfloat16
    assert weights["w"].tolist() == [2.25, 2.25]
    assert main(["merge", *paths, "--coefficients", "0,0,1", "--out", str(out)]) == 0
    assert safetensors.torch.load_file(out)["w"].tolist() == [3.0, 3.0]


def test_errors_and_warnings(paths: list[str], tmp_path: Path, capsys, monkeypatch) -> None:
    out = str(tmp_path / "out")
    assert main(["merge", *paths, "--coefficients", "1,2,1", "--out", out]) == 1
    said = capsys.readouterr().err
    assert "error: The coefficients 1,2,1 sum to 4, not to 1" in said
    assert "Divide each by the sum." in said
    torch.save({"model": {"w": torch.ones(2)}, "ema": {"w": torch.ones(2)}}, paths[0])
    assert main(["merge", paths[0], "--out", out]) == 1
    said = capsys.readouterr().err
    assert "at the keys 'model', 'ema', so which are the weights is unknown" in said
    assert "Choose one by key= (on the command line --key)" in said
    assert main(["merge", paths[0], "--key", "ema", "--out", out]) == 0
    for step, path in enumerate(paths):
        torch.save({"packed": torch.tensor([step, 1])}, path)
    capsys.readouterr()
    assert main(["merge", *paths, "--out", out]) == 0
    assert "warning: The checkpoints have different integers in 'packed'" in (
        capsys.readouterr().err
    )

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "merge", interrupted)
    assert main(["merge", *paths, "--out", out]) == 130
    assert "interrupted: nothing was written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["merge", "a"], "the following arguments are required: --out"),
        (["merge", "a", "--out", "b", "--shape", "sqrt"], "invalid choice: 'sqrt'"),
        (["merge", "a", "--out", "b", "--coefficients", "1;2"], "invalid numbers value: '1;2'"),
        (["merge", "a", "--out", "b", "--coefficients", "1", "--shape", "equal"], "not allowed"),
    ],
)
def test_wrong_arguments_are_status_2(arguments: list[str], text: str, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert text in capsys.readouterr().err


def test_help_says_what_it_does(capsys, monkeypatch) -> None:
    monkeypatch.setitem(os.environ, "COLUMNS", "100")
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "merge" in text
    assert "Average checkpoints of a model, in place of a decay of the learning rate." in text
    with pytest.raises(SystemExit):
        main(["merge", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for needed in (
        "python -m ema_triton merge --shape 1-sqrt step1.pt step2.pt step3.pt --out merged",
        "the oldest first",
        "folders of torch.distributed.checkpoint or save_pretrained",
        "{equal,linear,1-sqrt,cosine}",
        "(default: equal)",
        "a linear one is an equal average",
        "{float64,float32,bfloat16,float16}",
        "which sum to 1",
        "e.g. model or ema.weights",
        "Integers, like BatchNorm's counts, are the last checkpoint's.",
    ):
        assert needed in text


@pytest.fixture
def snapshots(tmp_path: Path) -> Path:
    """64 updates of a small model, two averages, every 4th update saved."""
    model = torch.nn.Linear(3, 2)
    schedules = {name: PowerFunction(sigma_rel=float(name)) for name in ("0.05", "0.10")}
    bank = EMABank(model, schedules)
    folder = Snapshots(tmp_path / "snapshots")
    folder.record(bank)
    for update_index in range(1, 65):
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight))
        bank.update()
        if update_index % 4 == 0:
            folder.save(bank)
    return tmp_path / "snapshots"


def test_a_folder_is_described(snapshots: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["snapshots", str(snapshots)]) == 0
    printed = capsys.readouterr().out
    assert printed == f"{Snapshots(snapshots)!r}\n"
    assert "32 of 2 averages (0.05, 0.10), from update 4 to 64" in printed


def test_an_average_is_rebuilt(
    snapshots: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, png = tmp_path / "out.safetensors", tmp_path / "profiles.png"
    asked = ["reconstruct", str(snapshots), "--sigma-rel", "0.07", "--out", str(out)]
    pytest.importorskip("matplotlib")
    assert main([*asked, "--at", "60", "--plot", str(png)]) == 0
    expected = Snapshots(snapshots).reconstruct(PowerFunction(sigma_rel=0.07), at=60)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{PowerFunction(sigma_rel=0.07)} at update 60, of 30 snapshots"
    assert lines[1] == f"profile error   {expected.profile_error:.2g}"
    assert lines[-1] == f"written: {out}, {png}"
    assert png.read_bytes()[:4] == b"\x89PNG"
    found = safetensors.torch.load_file(out)
    assert found.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        assert torch.equal(found[name], weight)


def test_a_target_out_of_reach_is_status_1(
    snapshots: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"
    asked = ["reconstruct", str(snapshots), "--sigma-rel", "0.005", "--out", str(out)]
    assert main(asked) == 1
    assert "the profile error is" in capsys.readouterr().err
    assert not out.exists()
    assert main([*asked, "--approximate"]) == 0
    assert "warning: These snapshots do not make" in capsys.readouterr().err
    assert out.exists()


def test_a_folder_that_is_not_there_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["snapshots"], ["reconstruct", "--gamma", "7", "--out", "out"]):
        assert main([*command[:1], str(tmp_path / "gone"), *command[1:]]) == 1
        assert f"error: There is no folder '{tmp_path / 'gone'}'" in capsys.readouterr().err
    assert not (tmp_path / "gone").exists()
