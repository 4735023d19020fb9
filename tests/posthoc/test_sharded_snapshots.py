"""Snapshots of sharded and of replicated models: whole tensors, written by rank 0."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ema_triton import Constant, EMABank, ModelEMA
from ema_triton.posthoc import Snapshots
from tests.ranks import run
from tests.sharded import by_fsdp, change, in_two_dimensions, wholes_of

pytest.importorskip("safetensors")
pytestmark = pytest.mark.distributed

SCHEDULES = {"a": Constant(0.5), "b": Constant(0.25)}


def _saves_whole_tensors(build, folder):
    torch.manual_seed(0)
    model = build()
    bank, tracked = EMABank(model, SCHEDULES), ModelEMA(model)
    snapshots = Snapshots(folder)
    snapshots.save(bank)
    for step in range(8):
        change(model, step)
        bank.update()
        tracked.update(0.375)
        snapshots.save(bank)
    states = [None] * dist.get_world_size()
    dist.all_gather_object(states, snapshots.state_dict())
    assert all(state == states[0] for state in states)
    expected = wholes_of(tracked)
    if dist.get_rank() == 0:
        result = Snapshots(folder).reconstruct(Constant(0.375))
        assert result.profile_error < 1e-6
        assert result.weights.keys() == expected.keys()
        for name, value in expected.items():
            found = result.weights[name].to(value.dtype)
            torch.testing.assert_close(found, value.cpu(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("build", "ranks"), [(by_fsdp, 2), (in_two_dimensions, 4)])
def test_whole_tensors_are_saved_and_rebuilt_on_one_process(build, ranks, tmp_path) -> None:
    run(ranks, _saves_whole_tensors, build, str(tmp_path))


def _fails_on_all_ranks(folder):
    model = by_fsdp()
    ema = ModelEMA(model)
    with torch.no_grad():
        next(iter(model.parameters())).fill_(1e6)
    ema.sync()
    with pytest.raises(ValueError, match=r"too large for torch\.float16"):
        Snapshots(folder, dtype=torch.float16).save(ema)


def test_an_error_on_rank_0_is_raised_on_all(tmp_path) -> None:
    run(2, _fails_on_all_ranks, str(tmp_path))


def _waits_for_no_rank(folder):
    ema = ModelEMA(nn.Linear(2, 1))
    snapshots = Snapshots(Path(folder) / str(dist.get_rank()))
    ema.update(0.5)
    if dist.get_rank() == 0:
        snapshots.save(ema)  # alone
    dist.barrier()
    snapshots.save(ema)
    return sorted(path.name for path in Path(folder).iterdir())


def test_a_replicated_model_is_saved_by_rank_0_alone(tmp_path) -> None:
    assert run(2, _waits_for_no_rank, str(tmp_path))[1] == ["0"]
