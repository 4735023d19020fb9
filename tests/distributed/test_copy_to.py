"""`copy_to` of sharded EMAs, and from under DistributedDataParallel."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ema_triton import ModelEMA
from ema_triton.distributed.dtensor import is_sharded, local_part
from tests.ranks import run
from tests.sharded import CASES, Net, by_fsdp, change, replicated, wholes, wholes_of

pytestmark = pytest.mark.distributed


def _trained(build) -> ModelEMA:
    torch.manual_seed(0)
    ema = ModelEMA(build())
    change(ema.model, 0)
    ema.update(0.25)
    return ema


def _copies_each_part(build):
    ema = _trained(build)
    averaged = wholes_of(ema)
    torch.manual_seed(1)
    target = build()
    kept = [(p.dtype, is_sharded(p), local_part(p).data_ptr()) for p in target.parameters()]
    assert any(not torch.equal(value, averaged[name]) for name, value in wholes(target).items())
    for model in (target, ema.model):
        ema.copy_to(model)
        found = wholes(model)
        assert found.keys() == averaged.keys()
        assert all(
            torch.equal(found[name], value.to(found[name])) for name, value in averaged.items()
        )
    found = [(p.dtype, is_sharded(p), local_part(p).data_ptr()) for p in target.parameters()]
    assert found == kept


@pytest.mark.parametrize(("build", "ranks"), CASES)
def test_a_likewise_sharded_model_gets_each_ranks_part(build, ranks) -> None:
    run(ranks, _copies_each_part, build)


def _is_gathered_after_a_forward():
    """FSDP2's root module holds its gathered parameters after a forward, until it is told."""
    ema = _trained(by_fsdp)
    target, x = by_fsdp(), torch.randn(6, 5)
    plain = Net()
    plain.load_state_dict(wholes_of(ema))
    with torch.no_grad():
        target(x)
        ema.copy_to(target)
        torch.testing.assert_close(target(x), plain(x))
    versions = [p._version for p in target.parameters()]
    ema.copy_to(target)
    assert all(p._version > old for p, old in zip(target.parameters(), versions, strict=True))


def test_a_sharded_target_computes_with_the_copied_weights() -> None:
    run(2, _is_gathered_after_a_forward)


def _does_not_fit():
    ema = _trained(by_fsdp)
    found = []
    for other in (Net(), replicated()):
        before = wholes(other)
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            ema.copy_to(other)
        found.append(str(caught.value))
        after = wholes(other)
        assert all(torch.equal(before[name], after[name]) for name in before)
    state = ema.state_dict(full_state_dict=True)  # the remedy
    if dist.get_rank() == 0:
        Net().load_state_dict(state["weights"])
    return found


def test_a_model_that_is_sharded_otherwise_is_an_error() -> None:
    for found in run(2, _does_not_fit):
        assert (
            "'first.weight' is sharded over 2 ranks (S(0)) in the EMA but not sharded" in found[0]
        )
        assert "sharded over 2 ranks (R)" in found[1]
        for said in found:
            assert "state_dict(full_state_dict=True)" in said
            assert "Nothing was copied" in said


def _into_shards():
    torch.manual_seed(0)
    ema = _trained(Net)
    target = by_fsdp()
    ema.copy_to(target)
    found, expected = wholes(target), ema.state_dict()["weights"]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_whole_ema_goes_into_a_sharded_model() -> None:
    run(3, _into_shards)


def _under_ddp():
    torch.manual_seed(0)
    ema = _trained(Net)
    target = Net()
    ema.copy_to(nn.parallel.DistributedDataParallel(target))
    expected = ema.state_dict()["weights"]
    assert all(torch.equal(value, expected[name]) for name, value in target.state_dict().items())


def test_ddp_is_taken_off_the_target() -> None:
    run(2, _under_ddp)
