"""A model with every kind of tensor that timm tells apart, and random walks of its weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Net(nn.Module):
    """With every kind of tensor that timm tells apart."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7)
        self.last = nn.Linear(7, 2)
        self.register_buffer("flags", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("shift", torch.rand(7))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu() + self.shift)


class Walk:
    """Steps of a random walk for all that a model saves, at a scale that a training has."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)

    def __call__(self, model: nn.Module) -> None:
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=self.generator)
                tensor.add_(noise.to(tensor.dtype), alpha=0.1)
            else:
                tensor.logical_not_() if tensor.dtype == torch.bool else tensor.add_(1)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert [*found] == [*expected]
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@contextmanager
def single_process() -> Iterator[None]:
    """A process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
