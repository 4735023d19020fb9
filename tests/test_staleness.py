"""A tensor that moved since the plan was made is noticed and followed; a write is no move."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from ema_triton import ModelEMA
from tests.test_plan import model, only_launch


def replace(m: nn.Sequential) -> None:
    m[2].weight = nn.Parameter(torch.full((3, 7), 3.0))


def set_data(m: nn.Sequential) -> None:
    m[2].weight.data = torch.full((3, 7), 3.0)


def cast(m: nn.Sequential) -> None:
    m.double()


def to_channels_last(m: nn.Sequential) -> None:
    m.to(memory_format=torch.channels_last)


def replace_module(m: nn.Sequential) -> None:
    m[2] = nn.Linear(7, 3)


def assign(m: nn.Sequential) -> None:
    m.load_state_dict({k: v.clone() + 1 for k, v in m.state_dict().items()}, assign=True)


CHANGES: list[Callable[[nn.Sequential], None]] = [
    replace,
    set_data,
    cast,
    to_channels_last,
    replace_module,
    assign,
]


@pytest.mark.parametrize("side", ["online", "ema"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_moves_is_noticed_and_followed(
    change: Callable[[nn.Sequential], None], side: str
) -> None:
    online = model()
    ema = ModelEMA(online)
    assert not ema._planner.plan.staleness.is_stale()
    change(online if side == "online" else ema.ema_model)
    assert ema._planner.plan.staleness.is_stale()
    before = [p.double() for p in ema.ema_model.parameters()]
    dtypes = [p.dtype for p in ema.ema_model.parameters()]
    ema.update(0.25)
    assert not ema._planner.plan.staleness.is_stale()
    for old, ours, theirs, dtype in zip(
        before, ema.ema_model.parameters(), online.parameters(), dtypes, strict=True
    ):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), torch.lerp(old, theirs.double(), 0.25))


def test_a_transposed_view_at_the_same_address_is_followed() -> None:
    online = nn.Linear(3, 3, bias=False)
    ema = ModelEMA(online)
    address = online.weight.data_ptr()
    online.weight.data = online.weight.data.t()
    assert online.weight.data_ptr() == address
    ema.update(1.0)
    assert torch.equal(ema.ema_model.weight, online.weight)


def test_in_place_writes_are_not_moves() -> None:
    online = model()
    ema = ModelEMA(online)
    plan = ema._planner.plan
    for m in (online, ema.ema_model):
        m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()})
    ema.update(0.5)
    assert ema._planner.plan is plan


def test_a_stale_plan_keeps_the_buffers_that_are_still_in_place() -> None:
    online = model()
    ema = ModelEMA(online)
    flat = only_launch(ema).bucket.flat
    replace(online)
    ema.update(0.5)
    assert only_launch(ema).bucket.flat is flat


def test_freed_addresses_cannot_be_mistaken() -> None:
    """Memory freed by a cast is handed out again at once; the plan keeps its own alive."""
    online = nn.Linear(4, 4, bias=False)
    ema = ModelEMA(online)
    for dtype in (torch.half, torch.bfloat16, torch.float):
        online.to(dtype)
        online.weight.data = online.weight.data.clone()
    online.weight.data = online.weight.data.t().contiguous().t()
    ema.update(1.0)
    assert torch.equal(ema.ema_model.weight, online.weight)
