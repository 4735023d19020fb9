"""Import hygiene: nothing that the user did not ask for, and clear errors where it is missing."""

import subprocess
import sys
import textwrap

import pytest

# Makes packages look as if they were not installed, to an import and to importlib.util.find_spec.
WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = name.partition(".")[0] in {names}
        return None if absent else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Installed
"""


def run(program: str, *, without: tuple[str, ...] = ()) -> str:
    code = WITHOUT.format(names=without) + textwrap.dedent(program)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_takes_neither_ignite_nor_triton_nor_the_compiler() -> None:
    found = run("""
        import ema_triton
        import sys
        wanted = ("ignite", "triton", "torch._dynamo", "torch.distributed.tensor")
        print([name for name in wanted if name in sys.modules])
    """)
    assert found == "[]"


def test_that_check_can_fail() -> None:
    pytest.importorskip("triton")
    assert run("import triton, sys; print('triton' in sys.modules)") == "True"
    with pytest.raises(AssertionError, match="No module named 'triton'"):
        run("import triton", without=("triton",))


def test_without_triton_and_ignite_the_ema_works() -> None:
    found = run(
        """
        import torch
        from ema_triton import HalfLife, ModelEMA
        model = torch.nn.Linear(2, 2)
        ema = ModelEMA(model)
        ema.update(HalfLife(10)(1))
        print(ema.backend, "|", ema.backend_reason)
        try:
            ModelEMA(model, backend="triton")
        except RuntimeError as error:
            print(error)
        """,
        without=("triton", "ignite"),
    )
    reason = "triton does not import (No module named 'triton'); pip install triton"
    assert f"foreach | {reason}" in found
    assert f"backend='triton' cannot run here: {reason}. Use backend='auto'" in found


def test_without_ignite_the_handler_says_what_to_do() -> None:
    found = run(
        """
        import ema_triton
        for attempt in ("from ema_triton import EMAHandler", "ema_triton.EMAHandler"):
            try:
                exec(attempt)
            except ImportError as error:
                print(error)
        """,
        without=("ignite",),
    )
    first, second = found.splitlines()
    assert first == second
    assert "pip install pytorch-ignite" in first
    assert "ema_triton.ModelEMA" in first


def test_without_ignite_the_handler_is_listed_all_the_same() -> None:
    assert run("import ema_triton; print('EMAHandler' in ema_triton.__all__)") == "True"
    with pytest.raises(AssertionError, match="has no attribute 'EMAHandle'"):
        run("import ema_triton; ema_triton.EMAHandle")


def test_imports_go_down_the_floors() -> None:
    floors = [
        {"schedules", "selection", "interrupts", "distributed.dtensor"},
        {
            "following",
            "ops.kernels",
            "ops.precision",
            "ops.philox",
            "distributed.collectives",
            "modules",
        },
        {"pairing"},
        {"copying"},
        {"state", "staleness", "checkpoint.interop"},
        {"plan", "checkpoint.state_dict"},
        {"ops.foreach_backend", "ops.triton_backend", "swap"},
        {"arguments", "backend", "distance", "checkpoint.copy_to"},
        {"planner"},
        {"model_ema"},
        {"bank"},
        {"posthoc.files", "posthoc.profiles"},
        {"posthoc.merging", "posthoc.log"},
        {"posthoc.reconstruct"},
        {"posthoc.snapshots"},
        {"posthoc.plot"},
        {"posthoc.__main__"},
        {"__main__"},
        {"handler", "integrations.lightning", "integrations.timm", "integrations.transformers"},
    ]
    import ast
    from pathlib import Path

    package = Path(__file__).parent.parent / "ema_triton"
    order = {name: floor for floor, names in enumerate(floors) for name in names}
    files = {
        ".".join(file.relative_to(package).with_suffix("").parts): file.read_text()
        for file in package.rglob("*.py")
    }
    empty = {
        f"{folder}.__init__" for folder in ("ops", "checkpoint", "distributed", "integrations")
    }
    assert {files.pop(name) for name in empty} == {""}
    del files["__init__"], files["posthoc.__init__"]
    assert files.keys() == order.keys()
    for name, source in files.items():
        imports = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)]
        imported = {node.module for node in imports}
        imported |= {f"{node.module}.{alias.name}" for node in imports for alias in node.names}
        for module in imported:
            below = module.removeprefix("ema_triton.")
            if below in order:
                assert order[below] < order[name], f"{name} imports {below}"
        assert not any(m.startswith("ignite") for m in imported) or name == "handler"
        with_triton = ("ops.kernels", "ops.triton_backend")
        assert not any(m.startswith("triton") for m in imported) or name in with_triton


@pytest.mark.parametrize(
    ("name", "frameworks", "imported_by_it"),
    [
        ("lightning", {"lightning", "pytorch_lightning"}, {"transformers"}),
        ("transformers", {"transformers"}, {"accelerate"}),
        ("timm", set(), set()),  # its ModelEmaV3 is a module like any other
    ],
)
def test_an_adapter_imports_its_own_framework_alone(
    name: str, frameworks: set[str], imported_by_it: set[str]
) -> None:
    others = ("accelerate", "diffusers", "ignite", "lightning", "peft", "pytorch_lightning", "timm")
    absent = {*others, "transformers"} - frameworks - imported_by_it
    # Importing Lightning warns of what torch deprecates.
    program = f"""
        import warnings
        warnings.simplefilter("ignore")
        import ema_triton.integrations.{name}
    """
    run(program, without=tuple(absent))
    if frameworks:
        with pytest.raises(AssertionError, match=f"ImportError: .*pip install.*{name}"):
            run(program, without=tuple(frameworks))
