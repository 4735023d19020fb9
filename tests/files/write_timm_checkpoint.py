"""Writes timm_checkpoint.pth.tar with timm's own code; README.md says how to run it."""

import argparse
import importlib.util
import sys
import tempfile
import types
from pathlib import Path

import torch
from torch import nn


def package(name: str, *folders: str) -> types.ModuleType:
    """Import by this name no more than what is found in the folders."""
    module = types.ModuleType(name)
    module.__path__ = list(folders)
    sys.modules[name] = module
    return module


# timm's models and torchvision are not needed: utils takes one class of torchvision, to compare.
spec = importlib.util.find_spec("timm")
assert spec is not None
package("timm", *spec.submodule_search_locations or ())
package("torchvision")
package("torchvision.ops")
package("torchvision.ops.misc").FrozenBatchNorm2d = type("FrozenBatchNorm2d", (nn.Module,), {})

from timm.utils import CheckpointSaver, ModelEmaV3  # noqa: E402


def count_up(model: nn.Module, start: float) -> None:
    """Fill with start, start + 1, ..., in the order of the state dict."""
    for tensor in model.state_dict().values():
        tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape) + start)
        start += tensor.numel()


model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
count_up(model, 0)
ema = ModelEmaV3(model, decay=0.75)
count_up(model, 8)
ema.update(model)
with tempfile.TemporaryDirectory() as folder:
    saver = CheckpointSaver(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        args=argparse.Namespace(model="two_layers", lr=0.1),
        model_ema=ema,
        checkpoint_dir=folder,
        recovery_dir=folder,
    )
    saver.save_checkpoint(epoch=3, metric=0.5)
    written = Path(folder, "last.pth.tar").read_bytes()
Path(__file__).with_name("timm_checkpoint.pth.tar").write_bytes(written)
