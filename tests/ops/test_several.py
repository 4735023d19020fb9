"""One launch for several EMAs: to the bit what a launch for each of them makes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from ema_triton import ModelEMA
from ema_triton.plan import Launch

triton_backend = pytest.importorskip("ema_triton.ops.triton_backend")

# A vector that is not aligned, one below a block, and two chunks with a ragged end.
LENGTHS = (5, 1000, 4096 + 1028)
MOMENTA = (0.1, 0.75, 1e-4, 0.3, 0.01)

PRECISIONS = [
    (torch.float32, torch.float32, "nearest"),
    (torch.float32, torch.bfloat16, "nearest"),
    (torch.bfloat16, torch.bfloat16, "nearest"),
    (torch.float64, torch.float64, "nearest"),
    *(
        (ema, ema, precision)
        for ema in (torch.bfloat16, torch.float16)
        for precision in ("exact", "stochastic")
    ),
    (torch.bfloat16, torch.float32, "exact"),
]


def launches_for(
    count: int, ema: torch.dtype, online: torch.dtype, device: torch.device, **options
) -> list[Launch]:
    """Of EMAs of one model, with weights of their own."""
    torch.manual_seed(0)
    flat = torch.randn(sum(LENGTHS) + 1, dtype=torch.float64).to(online).to(device)
    pieces = flat[1:].split(LENGTHS)  # one element after an aligned address
    aligned = torch.randn(4096, dtype=torch.float64).to(online).to(device)
    model = nn.ParameterList([nn.Parameter(piece) for piece in (*pieces, aligned)])
    if options.get("nonfinite") == "skip":
        for parameter in model:
            parameter.data[::3] = float("nan")
    found = []
    for number in range(count):
        average = ModelEMA(model, ema_dtype=ema, backend="foreach", seed=number, **options)
        for bucket in average._state.buckets:
            noise = torch.randn(bucket.flat.shape, dtype=torch.float64) + number
            bucket.flat.copy_(noise)
            if bucket.random_state is not None:
                bucket.random_state[1] = 3 * number
        (launch,) = average._planner.plan.launches
        found.append(launch)
    return found


def state_of(launch: Launch) -> list[Tensor]:
    bucket = launch.bucket
    tensors = (bucket.flat, bucket.residual, bucket.skip_counts)
    return [tensor.cpu().clone() for tensor in tensors if tensor is not None]


def assert_same_bits(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# Five are a launch of three and one of two.
@pytest.mark.parametrize(("count", "guard"), [(2, "skip"), (3, "skip"), (5, "propagate")])
@pytest.mark.parametrize(("ema", "online", "precision"), PRECISIONS, ids=str)
def test_several_are_averaged_as_each_is(
    count: int,
    ema: torch.dtype,
    online: torch.dtype,
    precision: str,
    guard: str,
    kernel_device: torch.device,
) -> None:
    results = []
    for update in ("each", "several"):
        launches = launches_for(
            count, ema, online, kernel_device, precision=precision, nonfinite=guard
        )
        for _ in range(2):
            if update == "each":
                for launch, momentum in zip(launches, MOMENTA, strict=False):
                    triton_backend.update(launch, momentum)
            else:
                triton_backend.update_several(launches, MOMENTA[:count])
        results.append([state_of(launch) for launch in launches])
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)
    # A control: the averages differ from each other, and have moved.
    for one, other in pairwise(results[0]):
        assert not torch.equal(one[0], other[0])
    before = launches_for(count, ema, online, kernel_device, precision=precision, nonfinite=guard)
    assert not torch.equal(state_of(before[0])[0], results[0][0][0])
