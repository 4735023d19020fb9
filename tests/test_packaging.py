"""The wheel and the sdist: what is in them, and that they run in an empty environment."""

import ast
import csv
import io
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_string
from email.message import Message
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

import pytest

import ema_triton

ROOT = Path(__file__).parent.parent
VERSION = ema_triton.__version__


class Built(NamedTuple):
    wheel: Path
    sdist: Path


def needs(*packages: str) -> None:
    """Skip where one is absent.

    A look for the module pip, as importorskip has it, makes setuptools take its distutils away from
    the whole process, and torch.compile fails in a later test.
    """
    for package in packages:
        try:
            distribution(package)
        except PackageNotFoundError:
            pytest.skip(f"{package} is not installed")


def run(*command: object, folder: Path) -> str:
    """What a command prints; it runs where no source is imported by chance."""
    done = subprocess.run(
        [*map(str, command)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """What `python -m build` makes, the wheel out of the sdist; offline, with what is installed."""
    needs("build", "hatchling")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, folder=folder)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    assert [wheel.name, sdist.name] == [
        f"ema_triton-{VERSION}-py3-none-any.whl",
        f"ema_triton-{VERSION}.tar.gz",
    ]
    return Built(wheel, sdist)


def files_in(folder: str) -> set[str]:
    found = {path for path in (ROOT / folder).rglob("*") if path.is_file()}
    return {path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts}


def in_wheel(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return set(file.namelist())


def in_sdist(sdist: Path) -> set[str]:
    with tarfile.open(sdist) as file:
        names = {member.name for member in file.getmembers() if member.isfile()}
    return {name.removeprefix(f"ema_triton-{VERSION}/") for name in names}


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as file:
        return message_from_string(
            file.read(f"ema_triton-{VERSION}.dist-info/METADATA").decode("utf-8")
        )


def test_the_wheel_has_every_module_and_nothing_else(built: Built) -> None:
    package = files_in("ema_triton")
    assert {"ema_triton/py.typed", "ema_triton/ops/kernels.py"} <= package
    of_metadata = {"METADATA", "WHEEL", "RECORD", "licenses/LICENSE"}
    assert in_wheel(built.wheel) == package | {
        f"ema_triton-{VERSION}.dist-info/{name}" for name in of_metadata
    }


def test_the_sdist_has_the_tests_and_what_they_read(built: Built) -> None:
    found = in_sdist(built.sdist)
    for folder in ("ema_triton", "tests", "bench", "docs", "examples"):
        assert {name for name in found if name.startswith(f"{folder}/")} == files_in(folder)
    assert {
        *("README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"),
        *("CITATION.cff", "Makefile", "constraints.txt", "pyproject.toml"),
    } <= found
    assert not {name for name in found if name.startswith((".venv", ".ci", "dist/"))}


def test_the_metadata_says_what_it_needs_and_for_whom_it_is(built: Built) -> None:
    found = metadata(built.wheel)
    assert (found["Name"], found["Version"]) == ("ema-triton", VERSION)
    assert (found["License-Expression"], found["License-File"]) == ("BSD-3-Clause", "LICENSE")
    assert found["Requires-Python"] == ">=3.10"
    assert found["Description-Content-Type"] == "text/markdown"
    assert found.get_payload().startswith("# ema_triton\n")
    always = {text for text in found.get_all("Requires-Dist") if "extra ==" not in text}
    assert {re.split(r"[^\w-]", text)[0] for text in always} == {
        *("torch", "triton", "pytorch-ignite")
    }
    assert "triton>=3.4; sys_platform == 'linux'" in always
    extras = {"demo", "bench", "docs", "files", "test", "dev"}
    frameworks = {"lightning", "timm", "transformers", "integrations"}
    assert extras | frameworks <= set(found.get_all("Provides-Extra"))
    classifiers = found.get_all("Classifier")
    versions = {text.split(" :: ")[-1] for text in classifiers if "Python :: 3." in text}
    assert versions == {"3.10", "3.11", "3.12", "3.13"}
    assert "Typing :: Typed" in classifiers
    assert any(text.startswith("Development Status ::") for text in classifiers)
    # PEP 639 forbids one beside an expression.
    assert not [text for text in classifiers if text.startswith("License ::")]


PROGRAM = """
import importlib.metadata, torch
import ema_triton
model = torch.nn.Linear(2, 1, bias=False)
ema = ema_triton.ModelEMA(model)
torch.nn.init.ones_(model.weight)
torch.nn.init.zeros_(ema.ema_model.weight)
ema.update(0.25)
print(ema.ema_model.weight.tolist())
print(ema_triton.__file__)
print(importlib.metadata.version("ema-triton"))
"""


@pytest.mark.parametrize("kind", Built._fields)
def test_it_installs_offline_and_runs_in_an_empty_environment(
    built: Built, kind: str, tmp_path: Path
) -> None:
    needs("pip")
    venv.create(tmp_path)  # with nothing in it, not even pip
    python = tmp_path / "bin" / "python"
    (site,) = tmp_path.glob("lib/python3.*/site-packages")
    # This environment lends it torch, and hatchling for the sdist. Its .pth files are not read
    # there, by which it may itself know the source.
    lent = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    (site / "lent.pth").write_text("\n".join(lent))
    absent = subprocess.run([python, "-I", "-c", "import ema_triton"], capture_output=True)
    assert b"No module named 'ema_triton'" in absent.stderr
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--ignore-installed")
    offline = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    run(*pip, *offline, getattr(built, kind), folder=tmp_path)
    value, place, version = run(python, "-I", "-c", PROGRAM, folder=tmp_path).splitlines()
    assert value == "[[0.25, 0.25]]"
    assert place == str(site / "ema_triton" / "__init__.py")
    assert version == VERSION


def test_the_sdist_makes_the_wheel_that_the_source_makes(built: Built, tmp_path: Path) -> None:
    build = (sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path)
    run(*build, ROOT, folder=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")

    def record(path: Path) -> set[tuple[str, ...]]:
        with zipfile.ZipFile(path) as file:
            text = file.read(f"ema_triton-{VERSION}.dist-info/RECORD").decode()
        return {*map(tuple, csv.reader(io.StringIO(text)))}

    assert record(wheel) == record(built.wheel)
    assert len(record(wheel)) == len(in_wheel(wheel)) > 30


def test_version_date_and_authors_are_the_same_everywhere() -> None:
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    # Required by version 1.2.0 of the format, and what else it knows of these.
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation.keys() <= {
        *("cff-version", "message", "type", "title", "abstract", "authors", "keywords"),
        *("license", "version", "date-released"),
    }
    assert (citation["cff-version"], citation["type"]) == ("1.2.0", "software")
    assert citation["version"] == VERSION == "0.2.0"
    project = (ROOT / "pyproject.toml").read_text()
    assert citation["license"] in re.findall(r'^license = "(.*)"$', project, re.MULTILINE)
    for author in citation["authors"]:
        assert author.keys() == {"name"}
        assert f'authors = [{{ name = "{author["name"]}" }}]' in project
    changelog = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## (.*)$", changelog, re.MULTILINE)
    assert headings[:2] == ["[Unreleased]", f"[{VERSION}] - {citation['date-released']}"]


def test_the_changelog_says_first_what_to_do() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    newest = changelog.split("\n## [")[2]
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^### |\Z)", newest, re.MULTILINE | re.DOTALL))
    assert [*sections] == ["Changed", "Removed", "Fixed", "Security", "Added"]
    for bullet in sections["Changed"].split("\n- ")[1:]:
        assert re.search(r"\bBefore:.*\bNow:.*\bDo:", bullet, re.DOTALL), bullet
    for bullet in sections["Removed"].split("\n- ")[1:]:
        assert "Do:" in bullet, bullet


def calls(source: str) -> list[tuple[str, dict[str, str]]]:
    """Every call in the source: what is called, and its keyword arguments, as written."""
    return [
        (ast.unparse(node.func), {k.arg or "**": ast.unparse(k.value) for k in node.keywords})
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
    ]


def unpickled(source: str) -> list[str]:
    """What in the source would run code that is in a file."""
    names = [
        name
        for name, keywords in calls(source)
        if name.endswith(("pickle.load", "pickle.loads", "Unpickler"))
        or (name.endswith("torch.load") and keywords.get("weights_only") != "True")
    ]
    return names + re.findall(r"^\s*(?:import|from) (?:pickle|joblib|dill)\b", source, re.MULTILINE)


def test_no_pickle_is_loaded_as_the_security_page_says() -> None:
    page = (ROOT / "SECURITY.md").read_text()
    assert "`weights_only=True`" in page
    loads = 0
    for path in (ROOT / "ema_triton").rglob("*.py"):
        source = path.read_text()
        assert unpickled(source) == [], path
        loads += sum(name == "torch.load" for name, _ in calls(source))
        if "FileSystemReader(" in source:  # the exception, whose metadata is a pickle
            assert path.relative_to(ROOT).as_posix() in page
    assert loads == 2
    assert "`.metadata`" in page


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(file)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "def f():\n    from pickle import loads",
    ],
)
def test_a_pickle_would_be_found(source: str) -> None:
    assert unpickled(source)
