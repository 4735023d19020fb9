"""timm, also where its dependency torchvision does not load: beside a CPU build of torch.

An installed timm is taken if it imports. Otherwise it is the one that the Makefile puts aside, with
a torchvision whose compiled operators are declared here and not defined, as nothing calls them.

    python -m tests.integrations.with_timm script.py ...    runs a script that imports timm
"""

import importlib
import os
import runpy
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(sys.prefix) / "timm"
MODULES = ("timm", "timm.data", "timm.loss", "timm.optim", "timm.task", "timm.utils")

# An operator is gone with the object that declared it.
_libraries: list[torch.library.Library] = []


def require() -> ModuleType:
    """timm, or the test module that calls this is skipped; in CI it is an error not to have it."""
    reason = missing()
    if reason and os.environ.get("CI"):
        raise RuntimeError(f"{reason}; in CI the tests of timm have to run. `make` installs it.")
    if reason:
        pytest.skip(reason, allow_module_level=True)
    if str(FOLDER) in sys.path:
        # Other frameworks would take a torchvision that can be found for one that works.
        sys.path.remove(str(FOLDER))
        _forget("torchvision")
    return sys.modules["timm"]


@cache
def missing() -> str:
    """Import timm; why that is impossible, if it is."""
    try:
        _import()
        return ""
    except (ImportError, RuntimeError) as error:  # torchvision's: an operator does not exist
        installed = f"timm does not import ({error})"
    _forget("timm", "torchvision")
    if not FOLDER.is_dir():
        return f"{installed}, and there is no {FOLDER}"
    _use_folder()
    _import()
    return ""


def _import() -> None:
    for name in MODULES:
        importlib.import_module(name)


def _use_folder() -> None:
    """Have timm and torchvision found in the folder."""
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):  # whose gradients or shapes torchvision registers in Python
        library.define(f"{operator}() -> Tensor")
    _libraries.append(library)
    sys.path.insert(0, str(FOLDER))


def _forget(*packages: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]


if __name__ == "__main__":
    if reason := missing():
        sys.exit(reason)
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
