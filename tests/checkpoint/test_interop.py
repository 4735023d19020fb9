"""What other libraries save is recognised, with the right values; anything else is an error."""

import copy
import random
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ema_triton import ModelEMA
from ema_triton.checkpoint.interop import ForeignWeights, extract_weights, read_file
from ema_triton.checkpoint.state_dict import SavedState
from ema_triton.modules import clean_name
from ema_triton.state import EMAState
from tests.states import saved

TIMM = Path(__file__).parents[1] / "files" / "timm_checkpoint.pth.tar"


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


class Tied(nn.Module):
    """With buffers, and with an extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.last = nn.Linear(3, 3)
        self.last.weight = self.first.weight

    def get_extra_state(self) -> dict:
        return {"note": "mine"}

    def set_extra_state(self, state: object) -> None:
        pass


def train(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.add_(torch.rand(tensor.shape).mul(8).to(tensor.dtype))


def own_of(model: nn.Module) -> tuple[dict[str, Any], list[list[str]]]:
    own = EMAState(model, precision="nearest", seed=0, guarded=False).tensors()
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(clean_name(name))
    return own, [*names.values()]


def recognised(state: object, model: nn.Module) -> ForeignWeights:
    """By a model of the same kind, with other values."""
    own, parameters = own_of(copy.deepcopy(model))
    for value in own.values():
        if isinstance(value, torch.Tensor):
            value.fill_(-7)
    found = extract_weights(saved(state), own, parameters)
    SavedState(found.weights, {}, strict=found.has_all_names).check_matches(own)
    return found


def assert_holds(found: ForeignWeights, model: nn.Module, *lacks: str) -> None:
    own, _ = own_of(model)
    assert found.weights.keys() == own.keys() - {*lacks}
    for name, value in found.weights.items():
        assert torch.equal(value, own[name]), name
    assert found.has_all_names == (not lacks)


def test_a_module() -> None:
    model = net()
    found = recognised(model.state_dict(), model)
    assert_holds(found, model)
    assert found[1:] == ("a module's state dict", None, True)


def test_ignite() -> None:
    handlers, engines = pytest.importorskip("ignite.handlers"), pytest.importorskip("ignite.engine")
    model = net()
    handler = handlers.EMAHandler(model, momentum=0.5)
    engine = engines.Engine(lambda engine, batch: train(model))
    handler.attach(engine)
    engine.run([1, 2, 3])
    found = recognised(handler.ema_model.state_dict(), model)
    assert_holds(found, handler.ema_model)
    assert not torch.equal(found.weights["0.weight"], model[0].weight)


def test_torch_averaged_model() -> None:
    model = net()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for _ in range(3):
        train(model)
        averaged.update_parameters(model)
    found = recognised(averaged.state_dict(), model)
    assert_holds(found, averaged.module)
    assert found[1:] == ("torch's AveragedModel", 3, True)
    assert not torch.equal(found.weights["0.weight"], model[0].weight)


@pytest.mark.parametrize("include_online_model", [True, False])
def test_ema_pytorch(include_online_model: bool) -> None:
    package = pytest.importorskip("ema_pytorch")
    model = Tied()
    ema = package.EMA(
        model, update_every=1, update_after_step=0, include_online_model=include_online_model
    )
    for _ in range(3):
        train(model)
        ema.update()
    state = ema.state_dict()
    assert any(name.startswith("online_model.") for name in state) == include_online_model
    found = recognised(state, model)
    assert_holds(found, ema.ema_model)
    assert found[1:] == ("ema-pytorch's EMA", 3, True)
    assert not torch.equal(found.weights["first.weight"], model.first.weight)


def test_timm_checkpoint() -> None:
    """tests/files/README.md says what is in it."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    own, parameters = own_of(model)
    found = extract_weights(read_file(TIMM), own, parameters)
    count = 2
    for name, value in own.items():
        expected = torch.arange(count, count + value.numel()).reshape(value.shape)
        count += value.numel()
        assert torch.equal(
            found.weights[name], expected.to(value.dtype) + (6 if "num" in name else 0)
        )
    assert found[1:] == ("a module's state dict", None, True)


def test_timm_model_ema() -> None:
    """The state dict of timm's ModelEmaV2 and V3, which is their `module`'s."""
    model = net()
    wrapper = nn.Module()
    wrapper.module = model
    found = recognised(wrapper.state_dict(), model)
    assert_holds(found, model)
    assert found[1:] == ("a module's state dict", None, True)


def diffusers_state(model: nn.Module) -> dict[str, Any]:
    training_utils = pytest.importorskip("diffusers.training_utils")
    ema = training_utils.EMAModel(model.parameters())
    for _ in range(3):
        train(model)
        ema.step(model.parameters())
    return ema.state_dict()


@pytest.mark.parametrize("kind", [net, Tied])
def test_diffusers(kind: Callable[[], nn.Module]) -> None:
    model = kind()
    state = diffusers_state(model)
    found = recognised(state, model)
    lacks = [name for name in model.state_dict() if "num" in name or "running" in name]
    assert len(lacks) == 3
    averaged = copy.deepcopy(model)
    for parameter, shadow in zip(averaged.parameters(), state["shadow_params"], strict=True):
        assert not torch.equal(parameter, shadow)
        parameter.data.copy_(shadow)
    assert_holds(found, averaged, *lacks)
    assert (found.source, found.updates) == ("diffusers' EMAModel", 3)


def test_what_is_recognised_can_be_loaded() -> None:
    for kind in (net, Tied):
        model = kind()
        states = [AveragedModel(model).state_dict(), diffusers_state(model)]
        for state in states:
            ema = ModelEMA(kind())
            own, parameters = own_of(ema.ema_model)
            found = extract_weights(saved(state), own, parameters)
            with nullcontext() if found.has_all_names else pytest.warns(match="which stay as th"):
                ema.load_state_dict(found.weights, strict=found.has_all_names)
            loaded = own_of(ema.ema_model)[0]
            for name, value in found.weights.items():
                assert torch.equal(value, loaded[name])


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


NESTINGS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "compiled": (compiled, "a module's state dict"),
    "parallel": (nn.DataParallel, "a module's state dict"),
    "parallel of compiled": (
        lambda model: nn.DataParallel(compiled(model)),
        "a module's state dict",
    ),
    "compiled parallel of parallel": (
        lambda model: compiled(nn.DataParallel(nn.DataParallel(model))),
        "a module's state dict",
    ),
    "averaged of compiled parallel": (
        lambda model: AveragedModel(compiled(nn.DataParallel(model))),
        "torch's AveragedModel",
    ),
    "parallel of averaged of compiled": (
        lambda model: nn.DataParallel(AveragedModel(compiled(model))),
        "torch's AveragedModel",
    ),
}


@pytest.mark.parametrize("nesting", NESTINGS)
def test_wrappers_in_any_nesting(nesting: str) -> None:
    wrap, source = NESTINGS[nesting]
    model = net()
    found = recognised(wrap(model).state_dict(), model)
    assert_holds(found, model)
    assert found.source == source
    assert found.updates == (0 if "averaged" in nesting else None)


@pytest.mark.parametrize("nesting", NESTINGS)
def test_wrappers_in_the_state_of_ema_pytorch_and_of_timm(nesting: str) -> None:
    package = pytest.importorskip("ema_pytorch")
    wrap, source = NESTINGS[nesting]
    model = net()
    found = recognised(package.EMA(wrap(model)).state_dict(), model)
    assert_holds(found, model)
    assert (found.source, found.updates) == ("ema-pytorch's EMA", 0)
    state = {"state_dict": net().state_dict(), "state_dict_ema": wrap(model).state_dict()}
    found = recognised(state, model)
    assert_holds(found, model)
    assert found.source == source


class Teacher(nn.Module):
    """A model whose own names are those that wrappers give."""

    def __init__(self) -> None:
        super().__init__()
        self.ema_model = nn.Linear(2, 2)
        self.online_model = nn.Linear(2, 2)
        self.register_buffer("step", torch.tensor(5))
        self.register_buffer("initted", torch.tensor(True))


def outer(model: nn.Module) -> nn.Module:
    module = nn.Module()
    module.module = model
    return module


LOOKALIKES: dict[str, Callable[[], nn.Module]] = {
    "module": lambda: outer(net()),
    "module.module": lambda: outer(outer(net())),
    "n_averaged": lambda: AveragedModel(net()),
    "ema_model": Teacher,
    "module.ema_model": lambda: outer(Teacher()),
    "weights.module": lambda: nn.ModuleDict({"weights": outer(net()), "step": nn.Linear(1, 1)}),
}


@pytest.mark.parametrize("kind", LOOKALIKES)
def test_models_whose_names_look_like_a_wrappers(kind: str) -> None:
    package = pytest.importorskip("ema_pytorch")
    model = LOOKALIKES[kind]()
    for wrap, source in (
        (lambda model: model, "a module's state dict"),
        (nn.DataParallel, "a module's state dict"),
        (AveragedModel, "torch's AveragedModel"),
        (package.EMA, "ema-pytorch's EMA"),
    ):
        found = recognised(wrap(model).state_dict(), model)
        assert_holds(found, model)
        assert found.source == source


def test_names_that_do_not_fit_are_left_to_the_check() -> None:
    model, other = net(), nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    own, parameters = own_of(model)
    for wrap in (lambda model: model, nn.DataParallel, AveragedModel):
        found = extract_weights(wrap(other).state_dict(), own, parameters)
        assert [*found.weights] == [*other.state_dict()]
        with pytest.raises(ValueError, match=r"EMA model: '2.weight' is missing, '2.bias' is miss"):
            SavedState.parse(found.weights).check_matches(own)
    found = extract_weights({"module.a": torch.ones(1)}, own, parameters)
    assert [*found.weights] == ["module.a"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_diffusers_tensors_that_do_not_fit() -> None:
    ema = ModelEMA(net())
    before = ema.state_dict(clone=True)["weights"]
    own, parameters = own_of(net())
    shadows = [own[name] for name, *_ in parameters]
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    for wrong, message in (
        (shadows[:-1], "has 5 tensors without names, but this EMA model has 6 parameters"),
        ([*shadows, shadows[0]], "has 7 tensors without names, but this EMA model has 6 param"),
        ([], "has 0 tensors without names, but this EMA model has 6 parameters"),
        ([*shadows[1:], shadows[0]], r"'0.weight' is \(3,\) in the state but \(3, 2\) here"),
        ([*shadows[:2], None, *shadows[3:]], "'1.weight' is a NoneType, not a tensor"),
        ([*shadows[:5], shadows[5].to_sparse()], "'2.bias' has layout torch.sparse_coo"),
        ([nested, *shadows[1:]], "'0.weight' has layout .* or is quantized or nested"),
        ([nn.LazyLinear(2).weight, *shadows[1:]], "'0.weight' is uninitialized"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            ema.load_weights({"shadow_params": wrong, "optimization_step": 3})
        assert "Nothing was loaded. Load it into" in str(raised.value)
    assert all(torch.equal(value, before[name]) for name, value in own_of(ema.ema_model)[0].items())
    assert extract_weights({"shadow_params": tuple(shadows)}, own, parameters).updates is None


WEIGHTS = net().state_dict()
SLOTS = torch.optim.SGD(net().parameters(), lr=0.1).state_dict()
UNKNOWN = [
    ({"model": WEIGHTS, "optimizer": SLOTS, "epoch": 3}, "'model', 'optimizer', 'epoch'", "model"),
    ({"model": WEIGHTS, "model_ema": WEIGHTS}, "'model', 'model_ema'", "model_ema"),
    ({"loss": torch.tensor(1.0), "net": WEIGHTS}, "'loss', 'net'", "net"),
    (
        {"state_dict": WEIGHTS, "state_dict_ema": None},
        "'state_dict', 'state_dict_ema'",
        "state_dict",
    ),
    ({"net": nn.DataParallel(net()).state_dict(), "ema_rate": {}}, "'net', 'ema_rate'", "net"),
    ({"other": {"x": torch.ones(1)}, "net": WEIGHTS}, "'other', 'net'", "net"),
    (SLOTS, "'state', 'param_groups'", "model"),
    ({"shadow_params": None, "decay": 0.9}, "'shadow_params', 'decay'", "model"),
    ({0: torch.ones(1), None: {}, "x": 1}, "'0', 'None', 'x'", "model"),
    ({str(i): i for i in range(20, 40)}, "'23', '24' and 15 more", "model"),
    ({"state_dict_ema": {}}, "'state_dict_ema'", "model"),
]


@pytest.mark.parametrize(("state", "keys", "hint"), UNKNOWN)
def test_states_that_are_not_recognised(state: dict, keys: str, hint: str) -> None:
    own, parameters = own_of(net())
    with pytest.raises(ValueError, match="The state is not recognised") as raised:
        extract_weights(state, own, parameters)
    assert f"{keys}. Hand over" in str(raised.value)
    assert f"e.g. load_weights(torch.load(path)['{hint}'])." in str(raised.value)
    if hint in state:
        SavedState.parse(extract_weights(state[hint], own, parameters).weights).check_matches(own)


@pytest.mark.parametrize("state", [None, [], {}, WEIGHTS["0.weight"], net(), "path"])
def test_what_is_no_state(state: object) -> None:
    own, parameters = own_of(net())
    with pytest.raises(ValueError, match=r"must be a dict .* but got (an empty one|a [a-zA-Z]+)\."):
        extract_weights(state, own, parameters)


@pytest.mark.parametrize(
    ("count", "updates"),
    [
        (3, 3),
        (torch.tensor(3), 3),
        (torch.tensor([3], dtype=torch.uint8), 3),
        *((count, None) for count in (None, -1, True, 3.0, "3", torch.tensor(3.0), {}, [3])),
        *((count, None) for count in (torch.tensor([1, 2]), torch.tensor(-3), torch.tensor(True))),
        (torch.tensor(3, device="meta"), None),
        (torch.zeros(1, dtype=torch.uint8).view(torch.bits8), None),
    ],
)
def test_the_count_of_updates(count: object, updates: int | None) -> None:
    own, parameters = own_of(net())
    shadows = [own[name] for name, *_ in parameters]
    averaged = {"n_averaged": count, **{f"module.{name}": own[name] for name in own}}
    for state in (averaged, {"shadow_params": shadows, "optimization_step": count}):
        found = extract_weights(state, own, parameters)
        assert found.updates == updates
        assert type(found.updates) is type(updates)


def junk() -> list[object]:
    itself: dict[str, object] = {}
    itself["module.0.weight"] = itself["state_dict_ema"] = itself
    endless: list[object] = []
    endless.append(endless)
    return [
        *(
            None,
            3,
            -1,
            10**400,
            1.5,
            float("nan"),
            True,
            "x",
            b"x",
            [],
            (),
            {},
            object(),
            nn.Linear,
        ),
        *(itself, endless, {"0.weight": torch.ones(1)}, {3: torch.ones(1)}, [torch.ones(3, 2)]),
        *(torch.tensor(3), torch.tensor(2.5), torch.tensor(True), torch.ones(0), torch.ones(3, 2)),
        *(torch.ones(3, 2, device="meta"), torch.eye(3).to_sparse(), nn.LazyLinear(2).weight),
        *(torch.ones(3, dtype=torch.complex64).conj(), nn.Parameter(torch.ones(3)), net()),
    ]


KEYS = [
    *("module", "module.", "module.module.", "_orig_mod", "ema_model.", "online_model.x", "", "."),
    *("n_averaged", "step", "initted", "shadow_params", "optimization_step", "state_dict_ema"),
    *("0.weight", "module.0.weight", "_metadata", "_extra_state", "module._extra_state", "weights"),
    *(0, None, 1.5, (1, 2), True, b"module.", torch.ones(1), nn.Linear, frozenset()),
]
PREFIXES = ["module.", "_orig_mod.", "ema_model.", "online_model.", "module", ".", "n_averaged."]


def mangle(state: dict, draw: random.Random) -> dict:
    """With a few things in it that do not belong there, or are missing, or elsewhere."""
    for _ in range(draw.randrange(1, 5)):
        keys = [*state]
        key = draw.choice(keys) if keys else "x"
        what = draw.randrange(7)
        if what == 0:
            state.pop(key, None)
        elif what == 1:
            state[key] = draw.choice(junk())
        elif what == 2:
            state[draw.choice(KEYS)] = draw.choice(junk())
        elif what == 3 and isinstance(key, str):
            state[draw.choice(PREFIXES) + key] = state.pop(key, None)
        elif what == 4:
            prefix = draw.choice(PREFIXES)
            state = OrderedDict((f"{prefix}{name}", value) for name, value in state.items())
        elif what == 5:
            state = {draw.choice(KEYS): state, draw.choice(KEYS): draw.choice(junk())}
        elif what == 6 and isinstance(state.get("shadow_params"), list):
            shadows = [*state["shadow_params"], None]
            shadows[draw.randrange(len(shadows))] = draw.choice(junk())
            state["shadow_params"] = shadows[: draw.randrange(len(shadows), len(shadows) + 2) - 1]
    return state


def test_mangled_states_are_errors_or_make_sense() -> None:
    model = net()
    own, parameters = own_of(model)
    shadows = [own[name] for name, *_ in parameters]
    bases: list[dict] = [
        model.state_dict(),
        nn.DataParallel(model).state_dict(),
        AveragedModel(model).state_dict(),
        {
            "initted": torch.tensor(True),
            "step": torch.tensor(3),
            **{f"{kind}_model.{name}": own[name] for name in own for kind in ("online", "ema")},
        },
        {"epoch": 3, "state_dict": model.state_dict(), "state_dict_ema": model.state_dict()},
        {"decay": 0.9, "optimization_step": 3, "shadow_params": shadows},
    ]
    draw = random.Random(0)
    outcomes: Counter[str] = Counter()
    for _ in range(3000):
        base = copy.copy(draw.choice(bases))
        for key in ("state_dict_ema",):
            if key in base and draw.random() < 0.8:
                base[key] = mangle(copy.copy(base[key]), draw)
        state = mangle(base, draw)
        try:
            found = extract_weights(state, own, parameters)
        except ValueError as error:
            assert len(str(error)) > 100  # noqa: PT017
            outcomes["refused"] += 1
            continue
        assert all(isinstance(name, str) for name in found.weights)
        assert found.updates is None or (type(found.updates) is int and found.updates >= 0)
        assert found.has_all_names == ("diffusers" not in found.source)
        outcomes[found.source] += 1
    # The generator reaches all of it.
    assert len(outcomes) == 5
    assert min(outcomes.values()) >= 30, outcomes


def test_the_state_is_left_as_it_was() -> None:
    model = net()
    own, parameters = own_of(model)
    state = AveragedModel(model).state_dict()
    names = [*state]
    found = extract_weights(state, own, parameters)
    found.weights.clear()
    assert [*state] == names
    assert own.keys() == model.state_dict().keys()
