"""`ModelEmaV3` beside timm's own: the same constructor, methods, values and files."""

import copy
import inspect
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from ema_triton import ModelEMA
from ema_triton.integrations.timm import ModelEmaV3
from tests.integrations import with_timm
from tests.integrations.walks import Net, Walk, assert_equal, single_process
from tests.oracle import Shadow
from tests.tolerances import assert_update, update_bound

timm = with_timm.require()
TimmEma = timm.utils.ModelEmaV3
get_state_dict, unwrap_model = timm.utils.get_state_dict, timm.utils.unwrap_model

STEPS = 12


OPTIONS = {
    "default": {},
    "decay": {"decay": 0.3},
    "warm-up": {"decay": 0.9, "use_warmup": True},
    "other warm-up": {"use_warmup": True, "warmup_gamma": 2.5, "warmup_power": 0.75},
    "minimum": {"decay": 0.9, "use_warmup": True, "min_decay": 0.4},
    "minimum above the decay": {"decay": 0.3, "use_warmup": True, "min_decay": 0.6},
    "minimum without warm-up": {"decay": 0.3, "min_decay": 0.6},
    "later": {"decay": 0.9, "update_after_step": 4},
    "later, warm-up": {"decay": 0.9, "update_after_step": 4, "use_warmup": True},
    "no copy at first": {"decay": 0.9, "update_after_step": -1, "use_warmup": True},
    "copied buffers": {"decay": 0.9, "exclude_buffers": True},
    "tensor by tensor": {"decay": 0.9, "foreach": False},
    "cpu": {"decay": 0.9, "device": "cpu"},
    "cpu as a device": {"decay": 0.9, "device": torch.device("cpu")},
    "decay of 0": {"decay": 0.0},
    "decay of 1": {"decay": 1.0, "update_after_step": -1},
}


def test_the_constructor_is_timms() -> None:
    ours = inspect.signature(ModelEmaV3).parameters
    of_timm = inspect.signature(TimmEma).parameters
    assert [name for name in ours if name in of_timm] == [*of_timm]
    for name, parameter in of_timm.items():
        assert ours[name].default == parameter.default, name
    for name in ("update", "set", "get_decay", "forward"):
        of_ours, of_theirs = (
            {key: value.default for key, value in inspect.signature(one).parameters.items()}
            for one in (getattr(ModelEmaV3, name), getattr(TimmEma, name))
        )
        assert of_ours == of_theirs, name


@pytest.mark.parametrize("counted", [True, False], ids=["step", "no step"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_value_is_timms_bit_for_bit(options: dict[str, object], counted: bool) -> None:
    model, walk = Net(), Walk()
    ours, peer = ModelEmaV3(model, **options), TimmEma(model, **options)
    assert_equal(ours.state_dict(), peer.state_dict())
    for count in range(1, STEPS + 1):
        walk(model)
        step = count if counted else None
        assert ours.get_decay(step) == peer.get_decay(step)
        ours.update(model, step=step)
        peer.update(model, step=step)
        assert_equal(ours.state_dict(), peer.state_dict())
        assert_equal(get_state_dict(ours), get_state_dict(peer))


def test_control_the_walk_and_the_options_tell_averages_apart() -> None:
    results = []
    for name in ("decay", "warm-up", "minimum", "later", "copied buffers"):
        model, walk = Net(), Walk()
        torch.manual_seed(0)
        for tensor in model.state_dict().values():
            tensor.zero_()
        ema = ModelEmaV3(model, **OPTIONS[name])
        for step in range(1, STEPS + 1):
            walk(model)
            ema.update(model, step)
        results.append(torch.cat([t.double().flatten() for t in ema.state_dict().values()]))
    for index, result in enumerate(results):
        for other in results[index + 1 :]:
            assert not torch.equal(result, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_error_against_float64_is_bounded(dtype: torch.dtype) -> None:
    model, walk = Net().to(dtype), Walk()
    ema = ModelEmaV3(model, decay=0.9, use_warmup=True, dtype=torch.float32)
    if dtype == torch.float64:
        ema = ModelEmaV3(model, decay=0.9, use_warmup=True)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    names = [name for name, t in model.state_dict().items() if t.is_floating_point()]
    truth = Shadow({name: model.state_dict()[name] for name in names})
    bounds = {name: torch.zeros_like(truth.values[name]) for name in names}
    for step in range(1, STEPS + 1):
        walk(model)
        momentum = 1 - TimmEma.get_decay(ema, step)
        for name in names:
            online = model.state_dict()[name]
            # What was wrong before weighs less after it, by the decay.
            bounds[name] = (1 - momentum) * bounds[name] + update_bound(
                truth.values[name], online, kept
            )
        truth.update(model.state_dict(), momentum)
        ema.update(model, step)
    for name in names:
        found = ema.module.state_dict()[name]
        assert found.dtype == kept
        assert_update(found, truth.values[name], bounds[name])


def test_the_momentum_is_a_copy_up_to_the_first_step_and_1_minus_decay_after() -> None:
    model = nn.Linear(1, 1, bias=False)
    ema = ModelEmaV3(model, decay=0.75, update_after_step=2)
    seen = []
    for step in range(1, 6):
        model.weight.data.fill_(float(step))
        ema.update(model, step)
        seen.append(ema.module.weight.item())
    assert seen == [1.0, 2.0, 3.0, 3.25, 3.6875]


def test_without_a_step_there_is_neither_warm_up_nor_delay() -> None:
    model = nn.Linear(1, 1, bias=False)
    ema = ModelEmaV3(model, decay=0.75, use_warmup=True, update_after_step=100)
    start = ema.module.weight.item()
    model.weight.data.fill_(1.0)
    ema.update(model)
    assert ema.module.weight.item() == pytest.approx(0.75 * start + 0.25)
    ema.update(model, step=1)
    assert ema.module.weight.item() == 1.0


def test_a_decay_assigned_later_counts_and_a_subclass_may_have_its_own() -> None:
    class Halves(ModelEmaV3):
        def get_decay(self, step: int | None = None) -> float:
            return 0.5

    model = nn.Linear(1, 1, bias=False)
    for ema in (ModelEmaV3(model), Halves(model)):
        ema.decay = 0.5
        model.weight.data.fill_(1.0)
        ema.set(model)
        model.weight.data.fill_(3.0)
        ema.update(model)
        assert ema.module.weight.item() == 2.0


def test_floating_buffers_are_averaged_and_others_copied() -> None:
    model = Net()
    averaged = ModelEmaV3(model, decay=0.5)
    copied = ModelEmaV3(model, decay=0.5, exclude_buffers=True)
    model.norm.running_mean.fill_(2.0)
    model.norm.num_batches_tracked.fill_(7)
    model.flags.fill_(True)
    averaged.update(model)
    copied.update(model)
    assert averaged.module.norm.running_mean.unique().tolist() == [1.0]
    assert copied.module.norm.running_mean.unique().tolist() == [2.0]
    for ema in (averaged, copied):
        assert ema.module.norm.num_batches_tracked.item() == 7
        assert ema.module.flags.all()


def test_a_buffer_that_is_no_statistic_can_be_excluded() -> None:
    model = Net()
    ema = ModelEmaV3(model, decay=0.5, exclude="shift")
    model.shift.fill_(5.0)
    ema.update(model)
    assert ema.module.shift.unique().tolist() == [5.0]


def test_set_copies_everything() -> None:
    model, walk = Net(), Walk()
    ema = ModelEmaV3(model)
    walk(model)
    ema.set(model)
    assert_equal(ema.module.state_dict(), model.state_dict())


def test_calling_it_calls_the_ema_model_which_is_in_eval_mode() -> None:
    model = Net()
    model.train()
    ema = ModelEmaV3(model)
    x = torch.randn(4, 5)
    assert model.training
    assert not ema.module.training
    assert torch.equal(ema(x), ema.module(x))
    assert torch.equal(ema(x), copy.deepcopy(model).eval()(x))
    assert unwrap_model(ema) is ema.module
    assert isinstance(ema.ema, ModelEMA)
    assert ema.ema.ema_model is ema.module


def test_its_parameters_are_the_ema_models_alone() -> None:
    model = Net()
    ema = ModelEmaV3(model)
    assert [*ema.state_dict()] == [f"module.{name}" for name in model.state_dict()]
    assert [*ema.parameters()] == [*ema.module.parameters()]
    assert not {*ema.parameters()} & {*model.parameters()}
    ema.train()
    assert ema.module.training
    assert not any(parameter.requires_grad for parameter in ema.parameters())


@pytest.fixture
def single() -> Iterator[None]:
    with single_process():
        yield


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x) * self.scale


@pytest.mark.parametrize("built_of", ["model", "wrapped"])
@pytest.mark.parametrize(
    "wrap",
    [
        nn.parallel.DistributedDataParallel,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager"),
        nn.DataParallel,
        Wrapper,
    ],
    ids=["DDP", "compiled", "compiled DDP", "DataParallel", "a wrapper"],
)
def test_model_and_wrapper_are_one(wrap, built_of: str, single: None) -> None:
    model, walk = Net(), Walk()
    wrapped = wrap(model)
    ema = ModelEmaV3(model if built_of == "model" else wrapped, decay=0.5)
    peer = TimmEma(model, decay=0.5)
    built = ema.ema
    for given in (model, wrapped, unwrap_model(wrapped), wrapped):
        walk(model)
        ema.update(given)
        peer.update(model)
        assert_equal(get_state_dict(ema), get_state_dict(peer))
    assert ema.ema is built
    assert ema.ema.update_index == 4
    assert ema(torch.randn(2, 5)).shape == (2, 2)


@pytest.mark.parametrize("precision", [None, "exact"])
def test_another_model_of_the_same_shapes_may_be_given(precision: str | None) -> None:
    first, second, walk = Net().bfloat16(), Net().bfloat16(), Walk()
    ema = ModelEmaV3(first, decay=0.9, precision=precision)
    of_one = ModelEmaV3(first, decay=0.9, precision=precision)
    second.load_state_dict(first.state_dict())
    module = ema.module
    parameters = [*ema.parameters()]
    for count in range(4):
        walk(first)
        second.load_state_dict(first.state_dict())
        ema.update(second if count % 2 else first)
        of_one.update(first)
        assert_equal(ema.state_dict(), of_one.state_dict())
    assert ema.module is module
    assert [*map(id, ema.parameters())] == [*map(id, parameters)]
    assert ema.ema.update_index == 4
    found, expected = ema.ema.state_dict(), of_one.ema.state_dict()
    assert_equal(found["residuals"], expected["residuals"])
    assert found["random_state"] == expected["random_state"]
    ema.set(second)
    assert_equal(ema.module.state_dict(), second.state_dict())


def test_a_model_of_other_names_is_an_error_and_nothing_is_updated() -> None:
    ema = ModelEmaV3(Net())
    before, built = copy.deepcopy(ema.state_dict()), ema.ema
    with pytest.raises(ValueError, match="would not be averaged"):
        ema.update(nn.Linear(5, 7))
    assert_equal(ema.state_dict(), before)
    assert ema.ema is built


def test_a_module_that_was_replaced_is_the_one_averaged() -> None:
    model, walk = Net(), Walk()
    ema, peer = ModelEmaV3(model, decay=0.5), TimmEma(model, decay=0.5)
    for one in (ema, peer):
        one.module = copy.deepcopy(model)
        for parameter in one.module.parameters():
            parameter.data.zero_()
    walk(model)
    for one in (ema, peer):
        one.update(model)
    assert_equal(ema.state_dict(), peer.state_dict())
    ema.module = torch.compile(ema.module, backend="eager")
    built = ema.ema
    ema.update(model)
    peer.update(model)
    assert ema.ema is built
    assert_equal(get_state_dict(ema), get_state_dict(peer))


def test_batch_norms_may_become_synchronised_after_it_was_built() -> None:
    """As timm's script says: after cuda(), before SyncBN and DDP."""
    model, walk = Net(), Walk()
    ema, peer = ModelEmaV3(model, decay=0.5), TimmEma(model, decay=0.5)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(model.norm, nn.SyncBatchNorm)
    for _ in range(2):
        walk(model)
        ema.update(model)
        peer.update(model)
        assert_equal(ema.state_dict(), peer.state_dict())


def test_copies_and_pickles_go_on_with_the_model_they_are_given() -> None:
    model, walk = Net(), Walk()
    ema = ModelEmaV3(model, decay=0.5)
    walk(model)
    ema.update(model)
    twins = [copy.deepcopy(ema), pickle.loads(pickle.dumps(ema))]
    walk(model)
    for one in (ema, *twins):
        one.update(model)
    for twin in twins:
        assert_equal(twin.state_dict(), ema.state_dict())
        assert not {*twin.parameters()} & {*ema.parameters()}
        assert twin.ema.model is model
    together = copy.deepcopy({"model": model, "ema": ema})
    assert together["ema"].ema.model is together["model"]


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    def run(seed: int) -> Tensor:
        torch.manual_seed(5)
        model, walk = Net().bfloat16(), Walk()
        ema = ModelEmaV3(model, decay=0.99, stochastic_rounding_seed=seed)
        before = torch.get_rng_state()
        for _ in range(3):
            walk(model)
            ema.update(model)
        assert torch.equal(torch.get_rng_state(), before)
        return ema.module.first.weight.clone()

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


@pytest.mark.skipif(
    "dtype" not in inspect.signature(TimmEma).parameters, reason="this timm has no dtype="
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wider_dtype_than_the_models(dtype: torch.dtype) -> None:
    model, walk = Net().bfloat16(), Walk()
    ema, peer = (one(model, decay=0.99, dtype=dtype) for one in (ModelEmaV3, TimmEma))
    for step in range(1, STEPS + 1):
        walk(model)
        ema.update(model, step)
        peer.update(model, step)
    found, expected = ema.state_dict(), peer.state_dict()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        if tensor.is_floating_point():
            # Two roundings of each here, three in timm's mul_ and add_.
            bound = 5 * STEPS * torch.finfo(dtype).eps / 2 * tensor.abs().max().item()
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=bound)


def test_state_dicts_go_from_timms_to_this_one_and_back() -> None:
    model, walk = Net(), Walk()
    ours, peer = ModelEmaV3(model, decay=0.5), TimmEma(model, decay=0.5)
    walk(model)
    peer.update(model)
    ours.load_state_dict(peer.state_dict())
    assert_equal(ours.state_dict(), peer.state_dict())
    walk(model)
    ours.update(model)
    peer.update(model)
    assert_equal(ours.state_dict(), peer.state_dict())
    walk(model)
    ours.update(model)
    peer.load_state_dict(ours.state_dict())
    assert_equal(peer.state_dict(), ours.state_dict())
    plain = ModelEMA(model, handle_buffers="update")
    plain.load_weights(ours.state_dict())
    assert_equal(plain.ema_model.state_dict(), ours.module.state_dict())


def test_it_may_be_built_before_the_model_moves_or_is_cast() -> None:
    model, walk = Net(), Walk()
    ema = ModelEmaV3(model, decay=0.5)
    before = ema.module.first.weight.detach().double().clone()
    model.double()
    walk(model)
    ema.update(model)
    expected = torch.lerp(before, model.first.weight.detach(), 0.5).float()
    torch.testing.assert_close(ema.module.first.weight.detach(), expected)
    assert ema.module.first.weight.dtype == torch.float32


def test_in_ci_it_is_an_error_if_there_is_no_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(with_timm, "missing", lambda: "timm does not import")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(RuntimeError, match="timm does not import; in CI the tests of timm have to"):
        with_timm.require()
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="timm does not import"):
        with_timm.require()
