"""What `EMACallback` refuses, with which words, and with which packages of Lightning it works."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pl = pytest.importorskip("lightning.pytorch")

from ema_triton.integrations.lightning import EMACallback  # noqa: E402
from tests.integrations.lightning_runs import (  # noqa: E402
    CONSTANT,
    MARKS,
    Net,
    callback,
    fit,
    trainer,
)
from tests.test_imports import WITHOUT  # noqa: E402

pytestmark = MARKS


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"excluded": "head"}, TypeError, "unexpected keyword argument 'excluded', which would do"),
        ({"precision": "double"}, ValueError, "precision can only be one of 'exact'"),
        ({"handle_buffers": "swap"}, ValueError, "handle_buffers can only be one of 'copy'"),
        ({"seed": -1}, ValueError, "seed must be an int"),
        ({"at_end": "swap"}, ValueError, "at_end can only be one of 'keep', 'copy', .*'swap'.*EMA"),
        ({"ema_model": nn.Linear(1, 1)}, TypeError, "unexpected keyword argument 'ema_model'"),
        ({"model": nn.Linear(1, 1)}, TypeError, "'model'.* takes: schedule, submodule, optimizer"),
        ({"as_module": False, "handle_buffers": "ema_train"}, ValueError, "as_module=False"),
    ],
)
def test_arguments_are_checked_when_it_is_made(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        EMACallback(CONSTANT, **options)


def test_the_schedule_is_one_function() -> None:
    with pytest.raises(TypeError, match=r"must be a function from the update index.*'short'"):
        EMACallback({"short": CONSTANT, "long": CONSTANT})
    with pytest.raises(TypeError, match="schedule"):
        EMACallback(0.1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"submodule": "nett"}, r"submodule='nett' is no module of Net.*'net', 'head'"),
        ({"submodule": "net.7"}, r"submodule='net.7' is no module of Net"),
        ({"submodule": "head.weight"}, r"submodule='head.weight' is no module"),
        ({"optimizer": 1}, r"optimizer=1, but .*configure_optimizers.* 1 optimizer"),
        ({"optimizer": -1}, r"optimizer=-1, but"),
        ({"include": "nett"}, "nett"),
        ({"momentum_scale": {"head": -1}}, "momentum_scale of 'head' must be finite"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_the_first_step(
    options: dict[str, Any], text: str
) -> None:
    model = Net()
    model.fail_in = {"train": AssertionError("it trains"), "sanity": AssertionError("it evaluates")}
    with pytest.raises(ValueError, match=text):
        fit(model, callback(**options))


def test_an_optimizer_of_another_part_is_refused() -> None:
    class Two(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.head.parameters(), lr=0.1)

    with pytest.raises(ValueError, match="has none of this model's parameters"):
        fit(Two(), callback(submodule="net"))


def test_two_of_one_name_are_refused() -> None:
    with pytest.raises(RuntimeError, match="state_key` must be unique"):
        trainer(callback(), callback())


def test_lightnings_own_averaging_beside_it_is_refused() -> None:
    averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")
    with pytest.raises(ValueError, match=r"EMAWeightAveraging.*state_dict.*Take one of them"):
        fit(Net(), callback(), averaging.EMAWeightAveraging())


def run(program: str, without: tuple[str, ...] = (), flags: tuple[str, ...] = ()) -> str:
    code = WITHOUT.format(names=without) + textwrap.dedent(program)
    done = subprocess.run(
        [sys.executable, *flags, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent.parent,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_lightning_it_says_what_to_install() -> None:
    found = run(
        """
        try:
            import ema_triton.integrations.lightning
        except ImportError as error:
            print(error)
        """,
        without=("lightning", "pytorch_lightning"),
    )
    assert "EMACallback needs Lightning 2.4 or later" in found
    assert "found none to import" in found
    assert "pip install 'lightning>=2.4'" in found
    assert "ModelEMA" in found


def test_too_old_a_lightning_is_named() -> None:
    found = run(
        """
        import sys, types
        old = types.ModuleType("lightning.pytorch")
        old.__version__, old.Callback = "2.3.1", type("Callback", (), {})
        sys.modules["lightning"] = types.ModuleType("lightning")
        sys.modules["lightning.pytorch"] = old
        try:
            import ema_triton.integrations.lightning
        except ImportError as error:
            print(error)
        """,
        without=("pytorch_lightning",),
    )
    assert "found ['lightning.pytorch 2.3.1']" in found


TRAINS = """
    import torch, {package} as pl
    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(1, 1)
        def training_step(self, batch, batch_idx):
            return self.head(batch).square().mean()
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)
    callback = EMACallback(Constant(0.5))
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, callbacks=callback,
                         enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(Net(), torch.utils.data.DataLoader(torch.ones(3, 1)))
    print(callback.ema.update_index)
"""


@pytest.mark.integration
@pytest.mark.parametrize("without", [("lightning",), ("pytorch_lightning",), ()])
def test_either_package_of_lightning_will_do(without: tuple[str, ...]) -> None:
    pytest.importorskip("pytorch_lightning")
    packages = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}
    program = """
        from ema_triton import Constant
        from ema_triton.integrations.lightning import EMACallback
    """
    programs = [TRAINS.format(package=p) for n, p in packages.items() if n not in without]
    found = run(textwrap.dedent(program) + "".join(map(textwrap.dedent, programs)), without)
    assert found.split("\n")[-1:] == ["3"]
    assert found.count("3") >= len(programs)
