"""What is written for users runs: the README's blocks, the docstrings' examples."""

import ast
import doctest
import importlib
import re
import warnings
from pathlib import Path

import pytest
import torch

from ema_triton import PowerFunction
from ema_triton.posthoc.profiles import gram, solve
from ema_triton.posthoc.reconstruct import RELATIVE_ROUNDING

ROOT = Path(__file__).parent.parent
MODULES = [
    "schedules",
    "checkpoint.interop",
    "model_ema",
    "bank",
    "handler",
    "posthoc.merging",
    "posthoc.profiles",
    "posthoc.snapshots",
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    if name == "handler":
        pytest.importorskip("ignite")
    module = importlib.import_module(f"ema_triton.{name}")
    result = doctest.testmod(module, extraglobs={"torch": importlib.import_module("torch")})
    assert result.attempted > 0
    assert result.failed == 0


def test_every_public_class_has_an_example() -> None:
    pytest.importorskip("ignite")
    import ema_triton

    for name in ema_triton.__all__:
        assert ">>>" in getattr(ema_triton, name).__doc__, name


def test_readme_examples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ignite")
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for variable, value in {**alone, "MASTER_PORT": "0"}.items():  # as torchrun would
        monkeypatch.setenv(variable, value)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 9
    names: dict[str, object] = {}
    for block in blocks:
        exec(block.replace("/tmp/ema_triton", str(tmp_path / "run")), names)
    printed = capsys.readouterr().out
    assert "foreach - " in printed or names["ema"].backend == "triton"
    assert "2 updates" in printed
    names["saver"](names["trainer"])
    assert [file.suffix for file in (tmp_path / "run_readme").iterdir()] == [".pt"]
    assert (tmp_path / "run_dcp" / ".metadata").exists()
    assert names["whole"]["update_index"] == 1
    assert names["handler"].update_index == 10
    assert names["trainer"].has_event_handler(names["show_distance"])
    names["show_distance"](names["trainer"])
    shown = names["trainer"].state.ema_distance
    assert shown == names["handler"].ema.distance()._asdict()
    assert shown["distance"] > 0


def test_the_example_of_merging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs/merging.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 3
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {"merged.safetensors"}
    assert "(docs/merging.md)" in (ROOT / "README.md").read_text()
    shown = re.findall(r"^\| `(.*?)`.*\| ([\d.]+, [\d., ]+)\|$", text, re.MULTILINE)
    from ema_triton.posthoc.merging import DECAYS, decay_coefficients

    assert {shape for shape, _ in shown} == DECAYS.keys()
    for shape, numbers in shown:
        rounded = [round(c, 3) for c in decay_coefficients(shape, 4)]
        assert [float(number) for number in numbers.split(",")] == rounded, shape


def test_the_example_of_snapshots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs/posthoc.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 4
    pytest.importorskip("ema_pytorch")
    assert "(docs/posthoc.md)" in (ROOT / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="These snapshots do not make the weights")
        for block in blocks:
            exec(block, names)
    printed = capsys.readouterr().out
    assert "64 of 2 averages (0.05, 0.10), from update 10 to 320" in printed
    assert names["result"].profile_error < 0.005
    assert names["last_half"].profile_error < 0.2


def test_the_table_of_what_to_store() -> None:
    text = (ROOT / "docs/posthoc.md").read_text()
    rows = re.findall(
        r"^\| (0\.\d+) \| ([\d.]+) % \| ([\d.]+) % \| ([\d.]+) % \|", text, re.MULTILINE
    )
    assert len(rows) == 8
    updates, moments = 64_000, 32
    sigmas = [0.05, 0.10, *(float(row[0]) for row in rows)]
    schedules = [PowerFunction(sigma_rel=sigma) for sigma in sigmas]
    momenta = torch.tensor(
        [[schedule(t) for schedule in schedules] for t in range(1, updates + 1)],
        dtype=torch.float64,
    )
    ends = [(updates * k // moments, a) for k in range(1, moments + 1) for a in (0, 1)]
    targets = [(updates, column) for column in range(2, len(sigmas))]
    matrix = gram(momenta, [*ends, *targets])
    for dtype, column in ((torch.float32, 2), (torch.bfloat16, 3)):
        noise = RELATIVE_ROUNDING * torch.finfo(dtype).eps * torch.ones(len(ends)).double()
        for row, solution in zip(rows, solve(matrix, noise), strict=True):
            found = (solution.profile_error, solution.expected_error)
            for shown, value in zip((row[1], row[column]), found, strict=True):
                assert float(shown) == pytest.approx(100 * value, rel=0.05), row


def test_readme_names_every_schedule_and_backend() -> None:
    import ema_triton
    from ema_triton.arguments import BACKENDS

    readme = (ROOT / "README.md").read_text()
    schedules = set(ema_triton.__all__) - {"EMAHandler", "ModelEMA"}
    for name in [*schedules, *BACKENDS]:
        assert name in readme, name


def messages() -> str:
    """All text in the package's code, with a blank for each value that is filled in."""
    texts = []
    for path in (ROOT / "ema_triton").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [one.value if isinstance(one, ast.Constant) else " " for one in node.values]
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_the_table_of_models_quotes_real_messages() -> None:
    table = (ROOT / "docs/models.md").read_text()
    rows = [row for row in table.splitlines() if row.startswith("|")]
    quotes = [quote for row in rows for quote in re.findall(r'(?<![=(`\w])"([^"`]{13,})"', row)]
    assert len(quotes) >= 15
    text = messages()
    for quote in quotes:
        assert quote in text, quote
    assert "is a TorchScript module, whose tensors nobody can reach" not in text


def test_the_table_of_models_is_linked_from_the_readme() -> None:
    assert "(docs/models.md)" in (ROOT / "README.md").read_text()
