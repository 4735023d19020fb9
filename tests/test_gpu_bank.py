"""Several averages in one launch, on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ema_triton import Constant, EMABank, ModelEMA
from tests.test_gpu import launched, network, no_synchronisation, shake

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:momentum .* is below")]

MOMENTA = (0.1, 0.02, 0.3, 0.7, 1e-3)


def bank_and_singles(model: nn.Module, count: int, **options) -> tuple[EMABank, list[ModelEMA]]:
    schedules = {str(number): Constant(MOMENTA[number]) for number in range(count)}
    bank = EMABank(model, schedules, backend="triton", **options)
    return bank, [ModelEMA(model, backend="triton", **options) for _ in range(count)]


def written(ema: ModelEMA) -> list[Tensor]:
    tensors = [(bucket.flat, bucket.residual) for bucket in ema._state.buckets]
    return [tensor.view(torch.uint8) for pair in tensors for tensor in pair if tensor is not None]


def update_each(singles: list[ModelEMA]) -> None:
    for momentum, single in zip(MOMENTA, singles, strict=False):
        single.update(momentum)


def assert_equal(bank: EMABank, singles: list[ModelEMA]) -> None:
    for average, single in zip(bank.values(), singles, strict=True):
        for one, other in zip(written(average), written(single), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.float32, "exact"),
        (torch.float64, "exact"),
        (torch.bfloat16, "exact"),
        (torch.float16, "exact"),
        (torch.bfloat16, "stochastic"),
        (torch.bfloat16, "nearest"),
    ],
)
def test_averages_at_once_equal_one_by_one(
    dtype: torch.dtype, precision: str, nonfinite: str, count: int
) -> None:
    model = network(width=65).to(dtype)
    bank, singles = bank_and_singles(model, count, precision=precision, nonfinite=nonfinite)
    for _ in range(3):
        shake(model)
        bank.update()
        update_each(singles)
        assert_equal(bank, singles)


@pytest.mark.parametrize(("count", "kernels"), [(1, 1), (2, 1), (3, 1), (4, 2)])
def test_three_averages_take_a_kernel(count: int, kernels: int) -> None:
    model = network()
    bank, singles = bank_and_singles(model, count)
    bank.update()
    assert len(launched(bank.update)) == kernels
    each = launched(lambda: [single.update(0.1) for single in singles])
    assert len(each) == count  # the control


def test_an_update_neither_synchronises_nor_allocates() -> None:
    model = nn.Sequential(network(), nn.BatchNorm1d(64).cuda())
    bank, _ = bank_and_singles(model, 3)
    for _ in range(3):
        bank.update()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with no_synchronisation():
        bank.update()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_a_captured_graph_updates_all_of_them() -> None:
    model = network()
    bank, singles = bank_and_singles(model, 3)
    bank.update()
    update_each(singles)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bank.update()
    for _ in range(2):
        shake(model)
        graph.replay()
        update_each(singles)
    assert_equal(bank, singles)
