"""Under `DistributedDataParallel` every rank has the same EMA, bit by bit."""

import copy
import hashlib
import pickle
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ema_triton import EMAHandler, ModelEMA, ranks
from tests.ranks import run

pytestmark = pytest.mark.distributed

STEPS = 200


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7, dtype=dtype)
        self.norm = nn.BatchNorm1d(7, dtype=dtype)
        self.last = nn.Linear(7, 1, dtype=dtype)
        self.register_buffer("flags", torch.zeros(3, dtype=torch.bool))

    def forward(self, x):
        self.flags[int(x[0, 0] > 0)] ^= True
        return self.last(self.norm(self.first(x)).relu())


def hashed(state) -> str:
    tensors = [*state["weights"].values(), *state["companions"].values()]
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def trainer_of(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def step(engine, number):
        torch.manual_seed(1000 * number + dist.get_rank())  # each rank has data of its own
        x = torch.randn(6, 5).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return Engine(step)


def _stays_equal(dtype, buffers, precision, broadcast, unwrapped=False):
    torch.manual_seed(dist.get_rank())  # DDP begins with rank 0's weights
    model = DistributedDataParallel(Net(dtype), broadcast_buffers=broadcast)
    handler = EMAHandler(
        model.module if unwrapped else model,
        momentum=0.01,
        handle_buffers=buffers,
        precision=precision,
    )
    trainer = trainer_of(model)
    handler.attach(trainer)
    hashes = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: hashes.append(hashed(handler.state_dict()))
    )
    trainer.run(range(STEPS))
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, hashes)
    assert len(set(hashes)) == STEPS
    return [sum(a == b for a, b in zip(everyones[0], theirs, strict=True)) for theirs in everyones]


CASES = [
    (torch.float32, "copy", "exact", 2),
    (torch.float32, "update", "exact", 3),
    (torch.bfloat16, "copy", "exact", 2),
    (torch.bfloat16, "update", "exact", 3),
    (torch.bfloat16, "update", "stochastic", 2),
]


@pytest.mark.parametrize(("dtype", "buffers", "precision", "size"), CASES)
def test_all_ranks_have_the_same_ema(dtype, buffers, precision, size) -> None:
    equal = run(size, _stays_equal, dtype, buffers, precision, True)
    assert equal == [[STEPS] * size] * size


@pytest.mark.parametrize("unwrapped", [False, True])
def test_that_check_can_fail(unwrapped) -> None:
    """Where DDP leaves the buffers to each rank, or is not known of, so does the EMA."""
    equal = run(2, _stays_equal, torch.float32, "copy", "exact", unwrapped, unwrapped)
    assert equal[0][0] == STEPS
    assert equal[0][1] == 0


def _follows_first(buffers):
    torch.manual_seed(dist.get_rank())
    model = DistributedDataParallel(Net())
    ema = ModelEMA(model, handle_buffers=buffers)
    alone = ModelEMA(copy.deepcopy(model.module), handle_buffers=buffers)
    trainer = trainer_of(model)
    versions = [buffer._version for buffer in model.buffers()]
    for step in range(5):
        trainer.run([step])
        online = {name: value.clone() for name, value in model.module.state_dict().items()}
        ema.update(0.3)
        for name, value in model.module.state_dict().items():
            assert torch.equal(value, online[name])  # the online model's buffers stay its own
        alone.model.load_state_dict(online)
        alone.update(0.3)
    assert versions != [buffer._version for buffer in model.buffers()]
    expected = [alone.state_dict()["weights"]]
    dist.broadcast_object_list(expected)
    for name, value in ema.state_dict()["weights"].items():
        assert torch.equal(value, expected[0][name]), name
    ema.sync()
    first = [model.module.state_dict()]
    dist.broadcast_object_list(first)
    for name, value in ema.state_dict()["weights"].items():
        assert torch.equal(value, first[0][name]), name
    twin = copy.deepcopy(ema)
    twin.update(0.1)
    ema.update(0.1)
    for name, value in ema.ema_model.state_dict().items():
        assert torch.equal(value, twin.ema_model.state_dict()[name]), name
    assert pickle.loads(pickle.dumps(ema)).update_index == ema.update_index


@pytest.mark.parametrize("buffers", ["copy", "update"])
def test_buffers_are_those_of_rank_0(buffers) -> None:
    run(2, _follows_first, buffers)


def _is_alone():
    ranks.PATIENCE = timedelta(seconds=2)
    model = DistributedDataParallel(Net())
    if dist.get_rank() == 1:
        with pytest.raises(RuntimeError) as caught:
            ModelEMA(model)
        assert str(caught.value) == (
            "Rank 1 waited for the other ranks of [0, 1] to build this EMA, up to 0:00:02 (Wait "
            "timeout). An EMA of a sharded model, or of a DistributedDataParallel one with "
            "buffers, is built on every rank. To have it on one rank only, give the module inside "
            "of DistributedDataParallel (model.module)."
        )
        ModelEMA(model.module).update(0.5)


def test_an_ema_on_one_rank_only_is_an_error_and_no_hang() -> None:
    run(2, _is_alone)


def _comes_first():
    ranks.PATIENCE = timedelta(seconds=2)
    model = DistributedDataParallel(Net())
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match="Rank 0 waited for the other ranks"):
            ModelEMA(model)


def test_rank_0_waits_no_longer() -> None:
    run(2, _comes_first)


def _has_no_buffers():
    model = DistributedDataParallel(nn.Linear(2, 2))
    if dist.get_rank() == 0:
        ema = ModelEMA(model)  # nothing has to follow anything, and nobody is waited for
        ema.update(0.5)


def test_without_buffers_one_rank_may_have_an_ema() -> None:
    run(2, _has_no_buffers)
