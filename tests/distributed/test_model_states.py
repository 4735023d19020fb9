"""A sharded model's state dict in one piece, gathered and loaded."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from ema_triton.distributed import collectives
from tests import ranks
from tests.sharded import Net, by_fsdp, change, wholes

pytestmark = pytest.mark.distributed


def gather_and_load() -> None:
    model, other, plain = by_fsdp(), by_fsdp(), Net()
    change(model, 1)
    gathered = [collectives.gather_model(model)]
    assert bool(gathered[0]) == (dist.get_rank() == 0)
    dist.broadcast_object_list(gathered)
    for target in (other, plain):
        assert not torch.equal(wholes(target)["first.weight"], gathered[0]["first.weight"])
        collectives.load_model(target, gathered[0], strict=True)
        assert all(torch.equal(value, gathered[0][name]) for name, value in wholes(target).items())
    without = {name: value for name, value in gathered[0].items() if name != "scale"}
    collectives.load_model(plain, without, strict=False)
    with pytest.raises(RuntimeError, match="scale"):
        collectives.load_model(plain, without, strict=True)


def test_whole_state_dicts_of_sharded_models() -> None:
    ranks.run(2, gather_and_load)
