"""`torch.distributed.checkpoint` saves an EMA from, and loads it onto, any number of ranks."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

pytest.importorskip("ignite")

from ignite.engine import Engine

from ema_triton import CountWarmup, EMAHandler, HalfLife, LinearWarmup, ModelEMA
from ema_triton.distributed.dtensor import local_part
from tests.ranks import run
from tests.sharded import (
    Net,
    assert_same,
    by_fsdp,
    change,
    in_hybrid,
    in_two_dimensions,
    of_bfloat16,
    of_float16,
    shard,
    wholes_of,
)

pytestmark = pytest.mark.distributed


def plain():
    return Net()


def plain_bfloat16():
    return Net(torch.bfloat16)


def _full(ema):
    """Its whole state, on every rank."""
    state = [ema.state_dict(full_state_dict=True)]
    dist.broadcast_object_list(state)
    return state[0]


def _saves(build, precision, folder):
    torch.manual_seed(0)
    model = build()
    ema = ModelEMA(model, precision=precision, seed=5)
    ema.schedule = HalfLife(10)
    assert isinstance(ema, Stateful)
    for step in range(3):
        change(model, step)
        ema.update(0.25)
    dcp.save({"ema": ema}, checkpoint_id=folder)
    return _full(ema)


def _loads(build, precision, folder, expected):
    model = build()
    ema = ModelEMA(model, precision=precision)
    change(model, 7)
    ema.update(0.5)  # other digits in what is loaded into
    dcp.load({"ema": ema}, checkpoint_id=folder)
    found = _full(ema)
    assert_same(found, expected)
    assert ema.schedule == HalfLife(10)
    change(model, 8)
    ema.update(0.25)
    again = ModelEMA(model, precision=precision)
    again.load_state_dict(expected)
    again.update(0.25)
    if precision != "stochastic":  # whose draws go by the place in the rank's memory
        assert_same(_full(ema), _full(again))


CASES = [
    (by_fsdp, "exact", 2, 3),
    (by_fsdp, "exact", 4, 1),
    (of_bfloat16, "exact", 3, 2),
    (of_bfloat16, "exact", 1, 4),
    (of_float16, "exact", 2, 3),
    (of_bfloat16, "stochastic", 2, 3),
    (of_bfloat16, "nearest", 2, 3),
    (plain, "exact", 2, 1),
    (plain_bfloat16, "exact", 1, 2),
    (plain_bfloat16, "stochastic", 2, 3),
]


@pytest.mark.parametrize(("build", "precision", "ranks", "others"), CASES)
def test_a_checkpoint_fits_any_number_of_ranks(build, precision, ranks, others, tmp_path) -> None:
    states = run(ranks, _saves, build, precision, tmp_path)
    run(others, _loads, build, precision, tmp_path, states[0])


@pytest.mark.parametrize("build", [in_hybrid, in_two_dimensions])
def test_a_checkpoint_of_two_dimensions_fits_one(build, tmp_path) -> None:
    states = run(4, _saves, build, "exact", tmp_path)
    run(2, _loads, by_fsdp, "exact", tmp_path, states[0])


def test_a_checkpoint_holds_each_byte_once(tmp_path) -> None:
    """Not the whole bucket for each view into it."""
    run(2, _saves_much, tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.distcp"))
    assert 4 * 50 * 256 * 256 < size < 1.1 * 4 * 50 * 256 * 256


def _saves_much(folder):
    holder = torch.nn.Module()
    holder.tensors = torch.nn.ParameterList(torch.randn(256, 256) for _ in range(50))
    fully_shard(holder)
    dcp.save({"ema": ModelEMA(holder)}, checkpoint_id=folder)


def _saves_asynchronously(build, folder):
    torch.manual_seed(0)
    model = build()
    ema = ModelEMA(model)
    change(model, 0)
    ema.update(0.25)
    expected = _full(ema)
    saved = dcp.async_save({"ema": ema}, checkpoint_id=folder)
    for step in range(1, 200):
        ema.update(0.25 + step / 1000)
        change(model, step)
    saved.result()
    other = ModelEMA(model)
    dcp.load({"ema": other}, checkpoint_id=folder)
    assert_same(_full(other), expected)
    assert not torch.equal(wholes_of(ema)["first.weight"], wholes_of(other)["first.weight"])


@pytest.mark.parametrize("build", [by_fsdp, of_bfloat16, plain, plain_bfloat16])
def test_updates_go_on_while_it_is_saved(build, tmp_path) -> None:
    run(2, _saves_asynchronously, build, tmp_path)


def _resumes_a_handler(folder):
    torch.manual_seed(0)

    def train(handler, model, begin, end):
        trainer = Engine(lambda engine, step: change(model, step))
        handler.attach(trainer)
        trainer.run(range(begin, end))

    model = by_fsdp()
    handler = EMAHandler(model, momentum=0.1, momentum_warmup=0.9, warmup_iters=8)
    train(handler, model, 0, 5)
    dcp.save({"model": model.state_dict(), "ema": handler}, checkpoint_id=folder)
    train(handler, model, 5, 9)

    other = by_fsdp()
    resumed = EMAHandler(other, momentum=0.5)  # the checkpoint knows better
    weights = other.state_dict()
    with pytest.warns(UserWarning, match="replaces Constant"):
        dcp.load({"model": weights, "ema": resumed}, checkpoint_id=folder)
    other.load_state_dict(weights)
    assert resumed.schedule == LinearWarmup(0.9, 0.1, 8)
    assert resumed.update_index == 5
    train(resumed, other, 5, 9)
    assert_same(_full(resumed.ema), _full(handler.ema))


def test_a_handler_resumes(tmp_path) -> None:
    run(2, _resumes_a_handler, tmp_path)


def _loads_before_it_follows(folder):
    model = by_fsdp()
    ema = ModelEMA(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema.follow(optimizer, CountWarmup(0.99))
    model(torch.randn(4, 5)).sum().backward()
    optimizer.step()
    assert ema.update_index == 1
    dcp.save({"ema": ema}, checkpoint_id=folder)
    other = ModelEMA(model)
    assert other.schedule is None
    dcp.load({"ema": other}, checkpoint_id=folder)
    assert (other.schedule, other.update_index) == (CountWarmup(0.99), 1)


def test_a_schedule_is_loaded_where_there_was_none(tmp_path) -> None:
    run(2, _loads_before_it_follows, tmp_path)


def _misses(folder):
    model = of_bfloat16()
    ema = ModelEMA(model, precision="nearest")
    dcp.save({"ema": ema}, checkpoint_id=folder)
    other = ModelEMA(model)
    change(model, 1)
    other.update(0.25)
    before = _full(other)
    with pytest.raises(BaseException, match=r"Missing key .* ema\.residuals"):
        dcp.load({"ema": other}, checkpoint_id=folder)
    assert_same(_full(other), before)


def test_what_a_checkpoint_lacks_is_an_error_and_nothing_is_loaded(tmp_path) -> None:
    run(2, _misses, tmp_path)


def _drops_keys(folder):
    """The model's hook does, of what the model itself saves."""
    model = of_bfloat16()
    model.first.register_state_dict_post_hook(lambda _, state, *__: state.clear())
    ema = ModelEMA(model)
    change(model, 0)
    ema.update(0.25)
    assert "first.weight" not in model.state_dict()
    dcp.save({"ema": ema}, checkpoint_id=folder)
    full = ema.state_dict(full_state_dict=True)
    for load in (
        lambda other: dcp.load({"ema": other}, checkpoint_id=folder),
        lambda other: other.load_state_dict(full, full_state_dict=True),
        lambda other: other.load_state_dict(ema.state_dict()),
    ):
        other = ModelEMA(model)
        load(other)
        assert_same(_full(other), _full(ema))
    assert [*_full(ema)["weights"]] == [*Net().state_dict()]


def test_a_sharded_model_that_drops_keys_is_saved_whole(tmp_path) -> None:
    run(2, _drops_keys, tmp_path)


def in_hybrid_bfloat16():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts"))
    return shard(Net(torch.bfloat16), mesh=mesh)


def _rounds_on(build, folder):
    torch.manual_seed(0)
    model = build()
    ema = ModelEMA(model, precision="stochastic", seed=3)
    for step in range(5):
        change(model, step)
        ema.update(0.1)
        if step == 2:
            dcp.save({"ema": ema}, checkpoint_id=folder)
            weights = {name: value.clone() for name, value in model.state_dict().items()}
    other = ModelEMA(model, precision="stochastic")
    dcp.load({"ema": other}, checkpoint_id=folder)
    model.load_state_dict(weights)
    for step in range(3, 5):
        change(model, step)
        other.update(0.1)
    assert_same(_full(other), _full(ema))
    return {name: local_part(value).float() for name, value in ema.state_dict()["weights"].items()}


@pytest.mark.parametrize("build", [of_bfloat16, plain_bfloat16])
def test_stochastic_rounding_resumes_on_as_many_ranks(build, tmp_path) -> None:
    run(3, _rounds_on, build, tmp_path)


def test_replicas_of_a_shard_round_alike(tmp_path) -> None:
    parts = run(4, _rounds_on, in_hybrid_bfloat16, tmp_path)
    for one, other in ((0, 2), (1, 3)):
        for name, value in parts[one].items():
            assert torch.equal(value, parts[other][name])
    assert not all(torch.equal(value, parts[1][name]) for name, value in parts[0].items())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.filterwarnings("ignore:torch.distributed is unavailable")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_process_without_a_group_resumes_bit_by_bit(dtype, tmp_path) -> None:
    """Weights and residuals are read in place, before `load_state_dict` is called with them."""
    model = Net(dtype)
    handler = EMAHandler(model, momentum=0.3)

    def train(*steps):
        for step in steps:
            change(model, step)
            handler.ema.update(0.3)

    train(0, 1)
    state = handler.state_dict(clone=True)
    online = {name: value.clone() for name, value in model.state_dict().items()}
    dcp.save({"ema": handler}, checkpoint_id=tmp_path)
    train(2, 3)
    uncut = handler.state_dict(clone=True)
    dcp.load({"ema": handler}, checkpoint_id=tmp_path)  # into other weights and residuals
    assert_same(handler.state_dict(), state)
    model.load_state_dict(online)
    train(2, 3)
    assert_same(handler.state_dict(), uncut)
    # Without the residuals it ends elsewhere.
    model.load_state_dict(online)
    with pytest.warns(UserWarning, match="what was rounded off"):
        handler.ema.load_state_dict(state["weights"])
    train(2, 3)
    assert not torch.equal(
        handler.state_dict()["residuals"]["first.weight"], uncut["residuals"]["first.weight"]
    )
