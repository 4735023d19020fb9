"""What is written for users runs: README's and the pages' blocks, the docstrings' examples."""

import ast
import doctest
import importlib
import re
import warnings
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from bench.results import FOLDER, LIMIT, Results
from ema_triton import PowerFunction
from ema_triton.posthoc.profiles import gram, solve
from ema_triton.posthoc.reconstruct import RELATIVE_ROUNDING
from ema_triton.schedules import check_schedule

ROOT = Path(__file__).parent.parent
MODULES = [
    "schedules",
    "checkpoint.interop",
    "model_ema",
    "bank",
    "handler",
    "integrations.timm",
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


def blocks_of(path: Path, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)


def of_readme(names: dict, printed: str, folder: Path) -> None:
    assert names["ema"].update_index == 10
    assert names["handler"].update_index == 10
    assert names["handler"].ema_model.training is False
    assert (folder / "checkpoint.pt").exists()


def of_index(names: dict, printed: str, folder: Path) -> None:
    assert names["ema"].update_index == 10


def of_getting_started(names: dict, printed: str, folder: Path) -> None:
    assert "2 updates" in printed
    assert "foreach - " in printed or "triton - " in printed
    assert names["ema"].update_index == 3
    assert names["prediction"].shape == (2, 2)
    assert f"momentum {names['handler'].schedule(10):.4f} after 10 updates" in printed
    assert names["trainer"].has_event_handler(names["show_distance"])
    names["show_distance"](names["trainer"])
    shown = names["trainer"].state.ema_distance
    assert shown == names["handler"].ema.distance()._asdict()
    assert shown["distance"] > 0


def of_evaluate(names: dict, printed: str, folder: Path) -> None:
    assert [file.suffix for file in (folder / "best").iterdir()] == [".pt"]
    ema, model = names["ema"].ema_model.state_dict(), names["model"].state_dict()
    assert all(torch.equal(ema[name], model[name]) for name in model)  # copy_to


def of_resume(names: dict, printed: str, folder: Path) -> None:
    assert "goes on after update 3" in printed
    assert [file.suffix for file in (folder / "checkpoints").iterdir()] == [".pt"]
    assert names["handler"].update_index == 10
    assert (folder / "ema.safetensors").exists()


def of_nan_guard(names: dict, printed: str, folder: Path) -> None:
    assert printed == "{'weight': 1, 'bias': 0}\n1\n"


def of_many_gpus(names: dict, printed: str, folder: Path) -> None:
    assert (folder / "checkpoint" / ".metadata").exists()
    assert names["whole"]["update_index"] == 1


def of_several(names: dict, printed: str, folder: Path) -> None:
    assert names["bank"].update_index == 1
    assert [*names["trainer"].state.ema_momenta] == ["short", "long"]
    assert names["both"].update_index == 3


def of_merging(names: dict, printed: str, folder: Path) -> None:
    assert {path.name for path in folder.glob("*.safetensors")} == {"merged.safetensors"}


def of_posthoc(names: dict, printed: str, folder: Path) -> None:
    assert "64 of 2 averages (0.05, 0.10), from update 10 to 320" in printed
    assert names["result"].profile_error < 0.005
    assert names["last_half"].profile_error < 0.2


def of_migration(names: dict, printed: str, folder: Path) -> None:
    assert names["ema"].update_index == 1


# Of each page with Python on it, what must be right after its blocks have run; of the pages of
# frameworks see their own tests.
PAGES = {
    "README.md": of_readme,
    "docs/index.md": of_index,
    "docs/getting-started.md": of_getting_started,
    "docs/evaluate.md": of_evaluate,
    "docs/resume.md": of_resume,
    "docs/precision.md": None,  # asserts of its own
    "docs/nan-guard.md": of_nan_guard,
    "docs/many-gpus.md": of_many_gpus,
    "docs/several.md": of_several,
    "docs/merging.md": of_merging,
    "docs/posthoc.md": of_posthoc,
    "docs/migration.md": of_migration,
    "docs/how-it-works.md": None,  # asserts of its own
}
FRAMEWORKS = ("lightning", "transformers", "accelerate", "diffusers", "timm", "torchrun")


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_a_page(
    page: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ignite")
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for variable, value in {**alone, "MASTER_PORT": "0"}.items():  # as torchrun would
        monkeypatch.setenv(variable, value)
    monkeypatch.chdir(tmp_path)
    blocks = blocks_of(ROOT / page)
    assert len(blocks) == (ROOT / page).read_text().count("```python") > 0
    if any("import ema_pytorch" in block or "from ema_pytorch" in block for block in blocks):
        pytest.importorskip("ema_pytorch")
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="These snapshots do not make the weights")
        for block in blocks:
            exec(block, names)
    if (check := PAGES[page]) is not None:
        check(names, capsys.readouterr().out, tmp_path)


def pages() -> list[Path]:
    return sorted((ROOT / "docs").rglob("*.md"))


def test_every_page_with_python_is_run() -> None:
    here = {path.relative_to(ROOT).as_posix() for path in pages() if blocks_of(path)}
    assert here - {f"docs/{name}.md" for name in FRAMEWORKS} == {*PAGES} - {"README.md"}
    tests = [path for path in (ROOT / "tests").rglob("*.py") if path.name != "test_docs.py"]
    elsewhere = "\n".join(path.read_text() for path in tests)
    for name in FRAMEWORKS:
        assert f"docs/{name}.md" not in here or f"{name}.md" in elsewhere, name


def test_readme_and_pages_are_short() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in pages()}
    assert {name for name, lines in lengths.items() if lines > 250} == set()
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def test_every_page_is_in_the_menu_and_the_readme_links_to_files() -> None:
    menu = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(menu) == len({*menu})
    docs = {path.relative_to(ROOT / "docs").as_posix() for path in pages()}
    assert docs == {*menu}
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    assert len(links) > 20
    assert {link for link in links if not (ROOT / link).exists()} == set()
    guides = {f"docs/{page}" for page in menu if "/" not in page}
    assert guides - {"docs/index.md", "docs/benchmarks-cpu.md"} <= {*links}


def test_what_is_to_be_installed_is_said_and_can_be() -> None:
    """The package is in no index: its extras are installed from a clone, by pages and errors."""
    texts = {path: path.read_text() for path in [ROOT / "README.md", *pages()]}
    texts |= {path: path.read_text() for path in (ROOT / "ema_triton").rglob("*.py")}
    assert {path.name for path, text in texts.items() if "ema-triton[" in text} == set()
    extras = {extra for text in texts.values() for extra in re.findall(r'"\.\[([^]]+)\]"', text)}
    project = (ROOT / "pyproject.toml").read_text()
    assert {extra for extra in extras if f"\n{extra} = [" not in project} == set()
    for name in (*FRAMEWORKS, "merging", "posthoc", "resume", "getting-started"):
        assert "pip install " in texts[ROOT / f"docs/{name}.md"], name


def test_every_drawing_was_made_of_its_text() -> None:
    texts = [text for path in pages() for text in blocks_of(path, "mermaid")]
    named = {f"{sha256(text.encode()).hexdigest()[:12]}.svg" for text in texts}
    assert named
    assert named == {path.name for path in (ROOT / "docs" / "drawings").glob("*.svg")}


def test_the_table_of_merging() -> None:
    from ema_triton.posthoc.merging import DECAYS, decay_coefficients

    text = (ROOT / "docs/merging.md").read_text()
    shown = re.findall(r"^\| `(.*?)`.*\| ([\d.]+, [\d., ]+)\|$", text, re.MULTILINE)
    assert {shape for shape, _ in shown} == DECAYS.keys()
    for shape, numbers in shown:
        rounded = [round(c, 3) for c in decay_coefficients(shape, 4)]
        assert [float(number) for number in numbers.split(",")] == rounded, shape


def test_the_readmes_figures_are_those_of_the_committed_results() -> None:
    results = Results.load(FOLDER / "nvidia-h200.json")
    times = {
        (row.model, row.peer): row.times["device"].median / 1000
        for row in reversed(results.rows)  # the first timing counts
        if (row.case, row.schedule) == ("fp32<-fp32", "constant") and "device" in row.times
    }
    ours, peer = "ema_triton (triton)", "Ignite EMAHandler"
    large = {peer: times["llama-7b", peer] for peer in (ours, peer, LIMIT)}
    figures = [
        f"fp32 takes {large[ours]:.1f} ms, {large[LIMIT] / large[ours]:.0%} of the bandwidth",
        f"Ignite's takes {large[peer]:.1f} ms",
        f"the host: {times['resnet50', ours]:.2f} ms, Ignite's {times['resnet50', peer]:.2f}",
    ]
    readme = " ".join((ROOT / "README.md").read_text().split()).replace(" %", "%")
    for figure in figures:
        assert figure in readme
    many = " ".join((ROOT / "docs/many-gpus.md").read_text().split()).replace(" %", "%")
    assert figures[0].removeprefix("fp32 takes ") in many
    timings = re.findall(r"\b[\d.]+ (?:ms|µs|GB/s|TB/s)", readme)
    assert len(timings) == 3, timings  # those above; and one without its unit


def test_the_schedules_of_the_migration_are_schedules() -> None:
    import ema_triton

    text = (ROOT / "docs/migration.md").read_text()
    found = re.findall(r"`schedule = (.*?)`", text)
    assert len(found) >= 7
    for expression in found:
        check_schedule(eval(expression, vars(ema_triton)))


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


def test_docstrings_are_written_for_the_site() -> None:
    """mkdocstrings takes "Example:" for a box and its >>> for quotations, and shows no LaTeX."""
    for path in (ROOT / "ema_triton").rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"^ *Example:$", text, re.MULTILINE), path
        assert ":math:" not in text, path
        assert ".. math::" not in text, path


def test_the_site_asks_no_other_host_for_anything() -> None:
    settings = (ROOT / "mkdocs.yml").read_text()
    assert re.search(r"^  font: false", settings, re.MULTILINE)
    assert "http" not in settings
    assert "mermaid" not in settings  # material would load it from a CDN
