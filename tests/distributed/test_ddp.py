"""Under `DistributedDataParallel` the ranks' EMAs have equal parameters; none waits for another."""

import copy
import hashlib
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("ignite")

from ignite.engine import Engine, Events

from ema_triton import EMAHandler, ModelEMA
from tests.ranks import run

pytestmark = pytest.mark.distributed

STEPS = 200


class Net(nn.Module):
    """With buffers that each rank's own data changes."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7, dtype=dtype)
        self.norm = nn.BatchNorm1d(7, dtype=dtype)
        self.last = nn.Linear(7, 1, dtype=dtype)
        self.register_buffer("flags", torch.zeros(3, dtype=torch.bool))

    def forward(self, x):
        self.flags[int(x[0, 0] > 0)] ^= True
        return self.last(self.norm(self.first(x)).relu())


class WithoutBuffers(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7, dtype=dtype)
        self.norm = nn.LayerNorm(7, dtype=dtype)
        self.last = nn.Linear(7, 1, dtype=dtype)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).relu())


class WithEqualBuffers(WithoutBuffers):
    """Which depend on the number of steps, and not on the data."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(dtype)
        self.register_buffer("decayed", torch.ones(7, dtype=dtype))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x):
        self.decayed.mul_(0.99)
        self.count.add_(1)
        return super().forward(x)


def hashed(state, names=None) -> str:
    whole = hashlib.sha256()
    for part in ("weights", "residuals"):
        for name, tensor in state[part].items():
            if names is None or name in names:
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


def _counts_equal(build, dtype, buffers, precision):
    """In how many steps each rank's EMA is rank 0's: its parameters, and all of it."""
    torch.manual_seed(dist.get_rank())  # DDP begins with rank 0's weights
    model = DistributedDataParallel(build(dtype))
    handler = EMAHandler(model, momentum=0.01, handle_buffers=buffers, precision=precision)
    names = {name for name, _ in model.module.named_parameters()}
    trainer = trainer_of(model)
    handler.attach(trainer)
    hashes = []

    def note(engine):
        state = handler.state_dict()
        hashes.append((hashed(state, names), hashed(state)))

    trainer.add_event_handler(Events.ITERATION_COMPLETED, note)
    trainer.run(range(STEPS))
    assert all(len(set(of_each_step)) == STEPS for of_each_step in zip(*hashes, strict=True))
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, hashes)
    return [
        [sum(a[i] == b[i] for a, b in zip(everyones[0], found, strict=True)) for i in (0, 1)]
        for found in everyones
    ]


CASES = [
    (WithoutBuffers, torch.float32, "copy", "exact", 2),
    (WithoutBuffers, torch.bfloat16, "copy", "exact", 3),
    (WithEqualBuffers, torch.float32, "update", "exact", 3),
    (WithEqualBuffers, torch.bfloat16, "copy", "exact", 2),
    (WithEqualBuffers, torch.bfloat16, "update", "stochastic", 2),
]


@pytest.mark.parametrize(("build", "dtype", "buffers", "precision", "size"), CASES)
def test_all_ranks_have_the_same_ema(build, dtype, buffers, precision, size) -> None:
    equal = run(size, _counts_equal, build, dtype, buffers, precision)
    assert equal == [[[STEPS, STEPS]] * size] * size


@pytest.mark.parametrize(
    ("dtype", "buffers", "precision"),
    [
        (torch.float32, "copy", "exact"),
        (torch.bfloat16, "update", "exact"),
        (torch.bfloat16, "update", "stochastic"),
    ],
)
def test_parameters_are_the_same_and_buffers_are_each_ranks(dtype, buffers, precision) -> None:
    """Also the control of the test above: where something differs, it says so."""
    equal = run(2, _counts_equal, Net, dtype, buffers, precision)
    assert equal == [[[STEPS, STEPS], [STEPS, 0]]] * 2


def _has_its_own_buffers(buffers):
    torch.manual_seed(dist.get_rank())
    model = DistributedDataParallel(Net())
    ema = ModelEMA(model, handle_buffers=buffers)
    alone = ModelEMA(copy.deepcopy(model.module), handle_buffers=buffers)
    trainer = trainer_of(model)
    for step in range(5):
        trainer.run([step])
        online = {name: value.clone() for name, value in model.module.state_dict().items()}
        ema.update(0.3)
        for name, value in model.module.state_dict().items():
            assert torch.equal(value, online[name])  # the online model's buffers stay its own
        alone.model.load_state_dict(online)
        alone.update(0.3)
    expected = alone.state_dict()["weights"]
    for name, value in ema.state_dict()["weights"].items():
        assert torch.equal(value, expected[name]), name
    first = [expected]
    dist.broadcast_object_list(first)
    assert torch.equal(first[0]["first.weight"], expected["first.weight"])
    if dist.get_rank() == 1:
        assert not torch.equal(first[0]["norm.running_mean"], expected["norm.running_mean"])
    ema.sync()
    for name, value in ema.state_dict()["weights"].items():
        assert torch.equal(value, online[name]), name
    for twin in (copy.deepcopy(ema), pickle.loads(pickle.dumps(ema))):
        assert hashed(twin.state_dict()) == hashed(ema.state_dict())


@pytest.mark.parametrize("buffers", ["copy", "update"])
def test_each_rank_averages_its_own_buffers(buffers) -> None:
    run(2, _has_its_own_buffers, buffers)


def _is_on_rank_0_only():
    torch.manual_seed(dist.get_rank())
    model = DistributedDataParallel(Net())
    trainer = trainer_of(model)
    if dist.get_rank() == 0:
        ema = ModelEMA(model)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: ema.update(0.1))
    trainer.run(range(20))
    if dist.get_rank() == 0:
        return ema.update_index
    return None


def test_an_ema_on_rank_0_only_never_hangs() -> None:
    assert run(2, _is_on_rank_0_only) == [20, None]


def _joins():
    torch.manual_seed(dist.get_rank())
    model = DistributedDataParallel(Net())
    ema = ModelEMA(model)
    names = {name for name, _ in model.module.named_parameters()}
    trainer, hashes = trainer_of(model), []
    with model.join():
        for step in range(3 + 4 * dist.get_rank()):  # rank 0 has less data
            trainer.run([step])
            ema.update(0.1)
            hashes.append(hashed(ema.state_dict(), names))
    everyones = [None] * 2
    dist.all_gather_object(everyones, hashes)
    assert everyones[0] == everyones[1][:3]
    return ema.update_index


def test_an_ema_inside_join_never_hangs_where_data_is_uneven() -> None:
    assert run(2, _joins) == [3, 7]
