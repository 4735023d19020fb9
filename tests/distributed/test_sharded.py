"""EMAs of sharded models: each rank averages its own parts, and nothing goes between the ranks."""

import math
import random
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from ema_triton import ModelEMA
from ema_triton.distributed import dtensor
from ema_triton.distributed.dtensor import local_part
from ema_triton.ops.precision import join_residual
from tests.ranks import run
from tests.sharded import (
    CASES,
    DTYPES,
    Net,
    assert_same,
    by_fsdp,
    change,
    in_hybrid,
    in_mixed_precision,
    in_two_dimensions,
    kept_gathered,
    of_bfloat16,
    offloaded,
    replicated,
    whole,
    wholes,
    wholes_of,
)
from tests.tolerances import update_bound

pytestmark = pytest.mark.distributed


def _averages_each_part(build):
    torch.manual_seed(0)
    model = build()
    ema = ModelEMA(model)
    plain = Net(model.first.weight.dtype)
    plain.load_state_dict(wholes(model))
    truth = ModelEMA(plain, backend="foreach")
    for step in range(3):
        change(model, step)
        plain.load_state_dict(wholes(model))
        with CommDebugMode() as seen:
            ema.update(0.25)
        assert seen.get_total_counts() == 0
        truth.update(0.25)
    distance, expected = ema.distance(), truth.distance()
    assert distance.distance == pytest.approx(expected.distance)
    assert distance.norm == pytest.approx(expected.norm)
    assert distance.modules.keys() == expected.modules.keys()
    for name, of_module in expected.modules.items():
        assert distance.modules[name].distance == pytest.approx(of_module.distance)
    state, expected = ema.state_dict(full_state_dict=True), truth.state_dict()
    if dist.get_rank() == 0:
        assert_same(state, expected)
    else:
        assert state == {}
    keys = [None] * dist.get_world_size()
    mine = ema.state_dict()
    dist.all_gather_object(keys, ([*mine["weights"]], [*mine["residuals"]]))
    assert all(found == keys[0] for found in keys)


@pytest.mark.parametrize(("build", "ranks"), CASES)
def test_each_rank_averages_its_part(build, ranks) -> None:
    run(ranks, _averages_each_part, build)


def _is_on_one_rank_only():
    model = by_fsdp()
    if dist.get_rank() == 1:
        ema = ModelEMA(model)
        change(model, 0)
        ema.update(0.25)
        return ema.update_index
    return None


def test_building_and_updating_wait_for_no_other_rank() -> None:
    assert run(2, _is_on_one_rank_only) == [None, 1]


def _swaps(build):
    torch.manual_seed(0)
    model = build()
    ema = ModelEMA(model)
    change(model, 0)
    ema.update(0.25)
    x = torch.randn(6, 5).to(DTYPES.get(build, torch.float32))
    if build is replicated:
        x = distribute_tensor(x, model.scale.device_mesh, [Replicate()])
    with torch.no_grad():
        before = whole(model(x))  # leaves the root gathered
    averaged = wholes_of(ema)
    plain = Net(torch.float64)
    plain.load_state_dict(averaged)
    expected = plain(whole(x).double())
    online = wholes(model)
    addresses = [local_part(p).data_ptr() for p in model.parameters()]
    kept = {name: local_part(value).clone() for name, value in ema.state_dict()["weights"].items()}
    with ema.swapped() as evaluated:
        assert evaluated is model
        with torch.no_grad():
            found = whole(model(x))
        inside = ema.state_dict()["weights"]
        for name, value in kept.items():
            assert torch.equal(local_part(inside[name]), value)
    # Sums of at most 7 products, each rounded, in the dtype of the forward.
    rounding = 64 * torch.finfo(DTYPES.get(build, torch.float32)).eps
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=rounding)
    assert not torch.allclose(found.float(), before.float(), rtol=rounding, atol=rounding)
    with torch.no_grad():
        assert torch.equal(whole(model(x)), before)  # not with what was gathered of the EMA
    dtensor.reshard_fsdp2(model)
    assert addresses == [local_part(p).data_ptr() for p in model.parameters()]
    for name, value in wholes(model).items():
        assert torch.equal(value, online[name])
    for name, value in wholes_of(ema).items():
        assert torch.equal(value, averaged[name])


@pytest.mark.parametrize(("build", "ranks"), CASES)
def test_a_swapped_model_evaluates_the_ema(build, ranks) -> None:
    run(ranks, _swaps, build)


def _goes_wrong_without_resharding():
    dtensor.reshard_fsdp2 = lambda *models: None
    with pytest.raises((AssertionError, RuntimeError)):
        _swaps(by_fsdp)


def test_that_evaluation_depends_on_resharding() -> None:
    run(2, _goes_wrong_without_resharding)


def _twin(build, precision):
    torch.manual_seed(0)
    model = build()
    twin = build()
    with torch.no_grad():
        for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    x = torch.randn(6, 5).to(DTYPES.get(build, torch.float32))
    with torch.no_grad():
        twin(x)  # which leaves its root gathered
    ema = ModelEMA(model, ema_model=twin, precision=precision)
    alone = ModelEMA(model, precision=precision)
    assert ema.ema_model is twin
    for step in range(3):
        change(model, step)
        ema.update(0.25)
        alone.update(0.25)
        plain = Net(torch.float64)
        plain.load_state_dict(wholes_of(alone))
        rounding = 64 * torch.finfo(DTYPES.get(build, torch.float32)).eps
        with torch.no_grad():
            found = twin(x)
        torch.testing.assert_close(
            whole(found).double(), plain(x.double()), rtol=rounding, atol=rounding
        )
    state, expected = ema.state_dict(full_state_dict=True), alone.state_dict(full_state_dict=True)
    if state:
        assert_same(state, expected)
    with ema.swapped(), torch.no_grad():
        assert torch.equal(whole(model(x)), whole(found))
    with torch.no_grad():
        assert torch.equal(whole(twin(x)), whole(found))
    ema.load_state_dict(expected, full_state_dict=True)
    model.zero_grad()


TWINS = [
    (by_fsdp, 3, "exact"),
    (of_bfloat16, 2, "exact"),
    (of_bfloat16, 3, "nearest"),
    (kept_gathered, 2, "exact"),
    (offloaded, 2, "exact"),
    (in_two_dimensions, 4, "exact"),
    (in_hybrid, 4, "exact"),
]


@pytest.mark.parametrize(("build", "ranks", "precision"), TWINS)
def test_a_twin_sharded_alike_is_the_ema_model(build, ranks, precision) -> None:
    run(ranks, _twin, build, precision)


def _loads(build, path):
    torch.manual_seed(0)
    model = build()
    ema = ModelEMA(model)
    for step in range(3):
        change(model, step)
        ema.update(0.25)
    full = ema.state_dict(full_state_dict=True)
    rank = dist.get_rank()
    everywhere = [full]
    dist.broadcast_object_list(everywhere)
    expected = everywhere[0]
    other = ModelEMA(model)
    # From rank 0 alone.
    other.load_state_dict(full if rank == 0 else None, full_state_dict=True)
    found = other.state_dict(full_state_dict=True)
    if rank == 0:
        assert_same(found, expected)
    # Whole tensors on every rank.
    other = ModelEMA(model)
    other.load_state_dict(expected)
    found = other.state_dict(full_state_dict=True)
    if rank == 0:
        assert_same(found, expected)
    # Its own state, which goes on bit-equal.
    other = ModelEMA(model)
    other.load_state_dict(ema.state_dict())
    change(model, 9)
    ema.update(0.25)
    other.update(0.25)
    mine, found = ema.state_dict(full_state_dict=True), other.state_dict(full_state_dict=True)
    if rank == 0:
        assert_same(found, mine)
    # Another library's, from a file.
    ema.save_weights(path)
    dist.barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a file of weights cannot tell
        other.load_weights(path)
    for name, value in wholes_of(ema).items():
        assert torch.equal(wholes_of(other)[name], value)
    plain = Net(DTYPES.get(build, torch.float32))
    plain.load_state_dict(wholes_of(ema))
    into = ModelEMA(plain)
    assert dist.get_world_size() > 1
    into.load_state_dict(mine if rank == 0 else expected)


@pytest.mark.parametrize(("build", "ranks"), [c for c in CASES if c[0] is not in_mixed_precision])
def test_states_are_loaded_whole_and_in_parts(build, ranks, tmp_path) -> None:
    run(ranks, _loads, build, tmp_path / "ema.safetensors")


def _guards():
    model = by_fsdp()
    ema = ModelEMA(model, nonfinite="skip")
    before = wholes_of(ema)
    change(model, 0)
    if dist.get_rank() == 0:
        local_part(model.first.weight)[0, 0] = float("nan")
    ema.update(0.5)
    after = wholes_of(ema)
    kept = (after["first.weight"] == before["first.weight"]).nonzero().tolist()
    assert kept == [[0, 0]]
    return ema.nonfinite_counts()


def test_each_rank_counts_what_its_part_was_spared() -> None:
    none = {name: 0 for name, _ in Net().named_parameters()}
    assert run(2, _guards) == [none | {"first.weight": 1}, none]


def _groups():
    model = by_fsdp()
    ema = ModelEMA(model, exclude="first", momentum_scale={"last": 0.5})
    before = wholes_of(ema)
    change(model, 0)
    ema.update(0.5)
    after, online = wholes_of(ema), wholes(model)
    assert torch.equal(after["first.weight"], online["first.weight"])
    for name, share in (("norm.weight", 0.5), ("last.weight", 0.25)):
        assert torch.equal(after[name], torch.lerp(before[name], online[name], share))
    measured = ema.distance()
    assert measured.modules.keys() == {"", "last", "norm"}


def test_groups_are_those_of_the_whole_names() -> None:
    run(3, _groups)


def _follows():
    model = by_fsdp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with torch.no_grad():
        model(torch.ones(2, 5))  # its root shows gathered parameters now
    ema = ModelEMA(model)
    with torch.no_grad():
        model(torch.ones(2, 5))
    ema.follow(optimizer, lambda update_index: 0.5)
    for step in range(4):  # two of which accumulate
        model(torch.ones(2, 5)).sum().backward()
        if step % 2:
            optimizer.step()
    assert ema.update_index == 2


def test_it_follows_an_optimizer_of_shards() -> None:
    run(2, _follows)


def _is_written():
    """By an optimizer, inside a swap; and in place, from outside."""
    model = of_bfloat16()
    ema = ModelEMA(model)
    change(model, 0)
    ema.update(0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(2, 5, dtype=torch.bfloat16)).sum().backward()
    with pytest.warns(UserWarning, match="was written, or replaced"), ema.swapped():
        optimizer.step()
    ema.state_dict()["weights"]["first.weight"].fill_(2.0)
    change(model, 1)
    ema.update(0.25)
    online = wholes(model)["first.weight"].double()
    state = ema.state_dict(full_state_dict=True)
    if state:
        exact = join_residual(state["weights"]["first.weight"], state["residuals"]["first.weight"])
        # The old residual is at most half a spacing, of which the update leaves 0.75.
        bound = 0.75 * 2 * torch.finfo(torch.bfloat16).eps / 2
        bound = bound + update_bound(torch.full_like(online, 2.01), online, torch.float32)
        assert ((exact.double() - (1.5 + 0.25 * online)).abs() <= bound).all()


def test_it_goes_on_from_written_weights() -> None:
    run(3, _is_written)


def test_that_collectives_are_seen() -> None:
    run(2, _gathers)


def _gathers():
    ema = ModelEMA(by_fsdp())
    with CommDebugMode() as seen:
        ema.state_dict(full_state_dict=True)
    assert seen.get_total_counts() > 0


OPTIONS = [
    (of_bfloat16, {"ema_dtype": torch.float32}),
    (by_fsdp, {"ema_dtype": torch.bfloat16}),
    (by_fsdp, {"ema_dtype": torch.bfloat16, "precision": "nearest"}),
    (by_fsdp, {"handle_buffers": "update"}),
    (of_bfloat16, {"handle_buffers": "update"}),
    (by_fsdp, {"handle_buffers": "ema_train"}),
    (in_two_dimensions, {"ema_dtype": torch.float16, "nonfinite": "skip"}),
    (replicated, {"handle_buffers": "update", "ema_dtype": torch.bfloat16}),
]


def _takes_options(build, options):
    torch.manual_seed(0)
    model = build()
    ema = ModelEMA(model, **options)
    plain = Net(model.first.weight.dtype)
    plain.load_state_dict(wholes(model))
    truth = ModelEMA(plain, backend="foreach", **options)
    for step in range(3):
        change(model, step)
        plain.load_state_dict(wholes(model))
        ema.update(0.25)
        truth.update(0.25)
    online = wholes(model)
    with ema.swapped():
        inside = wholes(model)
    for name, value in wholes(model).items():
        assert torch.equal(value, online[name])
    state, expected = ema.state_dict(full_state_dict=True), truth.state_dict()
    if state:
        assert_same(state, expected)
        for name, value in state["weights"].items():
            assert torch.equal(inside[name], value.to(inside[name].dtype)), name
    other = ModelEMA(model, **options)
    other.load_state_dict(ema.state_dict())
    ema.sync()
    for name, value in wholes_of(ema).items():
        assert torch.equal(value, online[name].to(value.dtype)), name
    ema.load_state_dict(other.state_dict())
    found = ema.state_dict(full_state_dict=True)
    if found:
        assert_same(found, expected)


@pytest.mark.parametrize(("build", "options"), OPTIONS)
def test_options_mean_what_they_mean_of_one_rank(build, options) -> None:
    run(4 if build is in_two_dimensions else 3, _takes_options, build, options)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.middle(self.embedding(x)))


def _ties(wrap):
    torch.manual_seed(0)
    model = Tied()
    model.middle = wrap(model.middle)
    fully_shard(model.middle)
    fully_shard(model)
    names = ["embedding.weight", "middle.weight", "middle.bias", "head.weight"]
    before = [whole(model.embedding.weight), whole(model.middle.weight)]
    ema = ModelEMA(model)
    assert [*ema.state_dict()["weights"]] == names
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    ema.update(0.25)
    weights = wholes_of(ema)
    torch.testing.assert_close(weights["head.weight"], before[0] + 0.25)
    torch.testing.assert_close(weights["embedding.weight"], before[0] + 0.25)
    torch.testing.assert_close(weights["middle.weight"], before[1] + 0.25)
    x = torch.arange(5)
    with torch.no_grad():
        online = model(x)
        with ema.swapped():
            assert not torch.equal(model(x), online)
        assert torch.equal(model(x), online)


def unwrapped(layer):
    return layer


@pytest.mark.parametrize("wrap", [unwrapped, checkpoint_wrapper])
def test_tied_weights_and_wrapped_layers_keep_their_names(wrap) -> None:
    run(3, _ties, wrap)


def _moves():
    torch.manual_seed(0)
    model = by_fsdp()
    ema = ModelEMA(model, ema_dtype=torch.float32)
    before = wholes_of(ema)
    model.to(torch.bfloat16)  # replaces the local tensors of all parameters
    ema.update(0.25)
    after, online = wholes_of(ema), wholes(model)
    for name in ("first.weight", "last.bias"):
        expected = torch.lerp(before[name], online[name].float(), 0.25)
        assert torch.equal(after[name], expected)
    model.first.register_parameter("bias", None)
    with pytest.raises(ValueError, match=r"the online model lacks: 'first\.bias'"):
        ema.update(0.25)


def test_parts_that_move_are_followed() -> None:
    run(3, _moves)


def _estimates():
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
    model = by_fsdp()
    ema = ModelEMA(model)
    ema.update(0.1)
    parts = [local_part(value).numel() for value in ema.state_dict()["weights"].values()]
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return sum(parts)


def test_a_fake_process_group_is_enough_for_an_estimate() -> None:
    assert run(1, _estimates) == [5 + 1 + 1 + 1 + 7 + 1]  # a row each; and the buffers


def _random_model(chance, mesh):
    """Tensors of any shape, dtype and placement; and the same values in one piece."""
    model, plain = nn.Module(), nn.Module()
    for number in range(chance.randint(1, 8)):
        shape = [chance.choice([0, 1, 2, 3, 5, 8, 33]) for _ in range(chance.randint(0, 3))]
        dtype = chance.choice([torch.float32, torch.bfloat16, torch.float16, torch.float64])
        value = torch.randn(shape, generator=torch.Generator().manual_seed(number)).to(dtype)
        plain.register_parameter(f"p{number}", nn.Parameter(value.clone()))
        if chance.random() < 0.8:
            places = [
                Shard(chance.randrange(len(shape)))
                if shape and chance.random() < 0.7
                else Replicate()
                for _ in range(mesh.ndim)
            ]
            value = distribute_tensor(value, mesh, places, src_data_rank=None)
        model.register_parameter(f"p{number}", nn.Parameter(value))
    return model, plain


def _step(models, number):
    for model in models:
        for index, parameter in enumerate(model.parameters()):
            chance = torch.Generator().manual_seed(100 * number + index)
            delta = torch.randn(parameter.shape, generator=chance).to(parameter.dtype)
            local_part(parameter).data.add_(dtensor.shard_like(delta, parameter))


def _equals(ema, truth, what):
    found, expected = ema.state_dict(full_state_dict=True), truth.state_dict()
    if found:
        for part in ("weights", "residuals"):
            # A rank without a part of a tensor still lists an empty residual.
            listed = {n: v for n, v in found[part].items() if v.numel() or n in expected[part]}
            assert listed.keys() == expected[part].keys(), what
            for name, value in expected[part].items():
                assert torch.equal(listed[name], value), (what, name)


def _survives(seeds, shape):
    mesh = init_device_mesh("cpu", shape)
    for seed in seeds:
        chance = random.Random(seed)  # the same on every rank
        model, plain = _random_model(chance, mesh)
        options = {
            "ema_dtype": chance.choice([None, None, torch.float32, torch.bfloat16]),
            "nonfinite": chance.choice(["propagate", "skip"]),
        }
        ema, truth = ModelEMA(model, **options), ModelEMA(plain, backend="foreach", **options)
        for number in range(8):
            what = chance.choice(["update", "update", "swap", "sync", "reload", "spread", "move"])
            _step((model, plain), number)
            if what == "swap":
                before = wholes(model)
                with ema.swapped(), truth.swapped():
                    inside, expected = wholes(model), plain.state_dict()
                    for name, value in expected.items():
                        assert torch.equal(inside[name], value), (seed, number, name)
                for name, value in wholes(model).items():
                    assert torch.equal(value, before[name]), (seed, number, name)
            elif what == "sync":
                ema.sync()
                truth.sync()
            elif what == "reload":
                state = ema.state_dict(clone=True)
                ema = ModelEMA(model, **options)
                ema.load_state_dict(state)
            elif what == "spread":
                ema.load_state_dict(ema.state_dict(full_state_dict=True), full_state_dict=True)
            elif what == "move":
                for parameter in model.parameters():
                    local_part(parameter).data = local_part(parameter).data.clone()
            ema.update(0.3)
            truth.update(0.3)
            _equals(ema, truth, (seed, number, what))


@pytest.mark.parametrize("shape", [(2,), (3,), (2, 2)])
def test_any_tensors_placed_anyhow_are_averaged_as_in_one_piece(shape) -> None:
    run(math.prod(shape), _survives, range(40), shape, timeout=120)
