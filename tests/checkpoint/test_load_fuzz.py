"""Mangled states and files: each is loaded whole, or refused with one error and nothing changed."""

import copy
import io
import json
import random
import types
import warnings
from collections import ChainMap, OrderedDict, UserDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("ignite")

from ema_triton import EMAHandler, ModelEMA
from ema_triton.checkpoint.state_dict import SavedState
from ema_triton.schedules import Delayed, LinearWarmup, momentum_from
from tests.states import same

CASES = 150  # of each class and each of these
OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    **{
        f"{precision} {dtype}": {"precision": precision, "ema_dtype": getattr(torch, dtype)}
        for precision in ("exact", "stochastic", "nearest")
        for dtype in ("bfloat16", "float16")
    },
}
OWNERS = [EMAHandler, ModelEMA]
SCHEDULE = LinearWarmup(0.5, 0.1, 9)
CHANGED = "changed by what was refused"


class Told(nn.Module):
    """With an extra state, and integers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.register_buffer("count", torch.tensor(5))
        self.extra: Any = {"told": 1}

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def network() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(3, 4), Told(), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False))
    net.register_parameter("spin", nn.Parameter(torch.randn(2, dtype=torch.complex64)))
    return net


class Subject:
    """What a state is loaded into, and a twin that is never touched."""

    def __init__(self, owner: type, options: dict[str, Any], build: Any = network) -> None:
        self.owners = []
        for _ in range(2):
            torch.manual_seed(1)
            model = build()
            self.owners.append(owner(model, **options))
        self.emas = [getattr(owner, "ema", owner) for owner in self.owners]
        for ema in self.emas:
            ema.schedule = SCHEDULE
        self.step = 0
        self.go_on(3)
        self.start = self.emas[1].state_dict(clone=True)

    def go_on(self, updates: int = 1) -> None:
        for _ in range(updates):
            self.step += 1
            for ema in self.emas:
                chance = torch.Generator().manual_seed(self.step)
                for tensor in ema.model.state_dict().values():
                    if isinstance(tensor, Tensor) and tensor.is_floating_point():
                        tensor.normal_(generator=chance)
                ema.update(0.3)

    def restart(self) -> None:
        """Both from where they were, after something was loaded."""
        for ema in self.emas:
            ema.schedule = SCHEDULE
            ema.load_state_dict(copy.deepcopy(self.start))

    def picture(self) -> Any:
        """All that an error has to leave as it was."""
        ema = self.emas[0]
        tensors = [*ema.ema_model.named_parameters(), *ema.ema_model.named_buffers()]
        places = tuple((name, id(value), value.data_ptr()) for name, value in tensors)
        return {"state": ema.state_dict(clone=True), "places": places, "schedule": ema.schedule}

    def load(self, state: Any) -> list[str]:
        """Load it, and say what is wrong with that."""
        before, refused, problems = self.picture(), False, []
        state = closed(state)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.owners[0].load_state_dict(state)
        except Exception as error:
            refused = True
            if type(error) is not ValueError:
                problems.append(f"{type(error).__name__}: {str(error)[:60]}")
        if not refused:
            problems += disagreement(self.emas[0], before, state)
            self.restart()
            return problems
        if not same(self.picture(), before):
            self.restart()
            return [*problems, CHANGED]
        self.go_on()
        if not same(*(ema.state_dict() for ema in self.emas)):
            problems.append("goes on otherwise than its twin")
        return problems


def opened(state: dict[str, Any]) -> dict[str, Any]:
    """With a schedule whose parts can be mangled."""
    return state | {"schedule": json.loads(state["schedule"])}


def closed(state: Any) -> Any:
    """As it is saved, if what was made of the schedule can be."""
    if type(state) is dict and type(state.get("schedule")) is dict:
        with suppress(TypeError, ValueError):
            return state | {"schedule": json.dumps(state["schedule"])}
    return state


def full(weight: Any, rest: Any) -> Any:
    """The value of a weight of a state, joined with its residual."""
    if not isinstance(rest, Tensor):
        return weight
    if weight.is_complex():
        return torch.view_as_complex(full(torch.view_as_real(weight), rest))
    if rest.dtype == torch.int16:
        bits = weight.float().view(torch.int32) + rest
        joined = bits.view(torch.float32)
        return torch.where(joined == joined, joined, weight.float())
    return torch.where(rest.half() == weight, rest, weight.float())


def disagreement(ema: ModelEMA, before: Any, state: Any) -> list[str]:
    """Where an EMA differs from the state that it loaded; and whether it can go on."""
    mine, problems = ema.state_dict(), []
    whole = isinstance(state.get("weights"), Mapping)
    weights = state["weights"] if whole else state
    theirs = state["residuals"] if whole else {}
    for name, value in mine["weights"].items():
        if name not in weights:
            problems.append(f"loaded without {name}")
            continue
        if not isinstance(value, Tensor):
            problems += [] if same(value, weights[name]) else [f"{name} differs"]
            continue
        found = full(value, mine["residuals"].get(name))
        expected = full(weights[name], theirs.get(name))
        expected = expected.detach().as_subclass(Tensor).to(found.dtype)
        if not same(found.reshape(-1) + 0, expected.reshape(-1) + 0):
            problems.append(f"{name} differs")
    old = before["state"]
    for key in ("update_index", "random_state"):
        told = state[key] if whole else old[key]
        told = dict(told) if isinstance(told, Mapping) else told
        if not same(mine[key], told):
            problems.append(f"{key} differs")
    if whole and "schedule" not in state:
        problems.append("loaded without a schedule")
    elif whole and state["schedule"] is not None:
        if json.loads(mine["schedule"]) != json.loads(state["schedule"]):
            problems.append("the schedule differs")
        try:
            momentum_from(ema.schedule, ema.update_index + 1)
        except Exception as error:
            problems.append(f"a schedule was loaded that raises {type(error).__name__}")
    elif ema.schedule != before["schedule"]:
        problems.append("the schedule differs")
    return problems


JUNK: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 1.0, 0.5, float("nan"), float("inf"), 1j, "", "x", "exact"),
    *("stochastic", b"x", 2**31, 2**63 - 1, 2**63, 2**64, -(2**70), 10**400, -(10**5000)),
    *([], [1], (), {}, {"a": 1}, {5: 6}, {"seed": 1}, {"updates": 1}, {"name": "Constant"}),
    *(UserDict(), set(), object(), ..., nn.Linear),
    *(torch.tensor(1), torch.ones(2), torch.tensor(float("nan")), torch.Size([2]), torch.float32),
]
KEYS: list[Any] = ["", "x", "weights.", "0.weight.0", "_orig_mod", 5, 0.5, None, True, b"x", ("x",)]
PLACES = ["", "version", "update_index", "schedule", "weights", "precision", "residuals"]
PLACES += [
    "random_state",
    "random_state.seed",
    "random_state.updates",
    "schedule.name",
    "schedule.updates",
]
PLACES += [f"schedule.schedule{key}" for key in ("", ".name", ".momentum", ".warmup_iters", ".x")]
DTYPES = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int16),
    *(torch.int8, torch.uint8, torch.uint16, torch.bool, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]
OPAQUE = [torch.bits8, torch.bits16, torch.int4, torch.uint4, torch.float4_e2m1fn_x2]


class Subclass(Tensor):
    """Like any other."""


def nested(tensor: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([tensor.flatten(), tensor.flatten()])


def quantized(tensor: Tensor) -> Tensor:
    return torch.quantize_per_tensor(torch.zeros(tensor.shape), 0.1, 0, torch.quint8)


def uninitialized(tensor: Tensor) -> Tensor:
    return nn.UninitializedParameter()


TENSORS: list[Callable[[Tensor], Any]] = [
    lambda t: t.unsqueeze(0),
    lambda t: t.flatten()[:-1],
    lambda t: t.new_zeros(0),
    lambda t: t.new_zeros(7, 7),
    lambda t: t.reshape(-1)[0],
    lambda t: t.t().contiguous().t() if t.dim() == 2 else t.repeat(2)[::2],
    lambda t: t.reshape(-1)[0].expand(t.shape),
    lambda t: t.to("meta"),
    lambda t: t.clone().fill_(1) if t.dtype == torch.bool else t * 2,
    lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t,
    lambda t: torch.full_like(t, -float("inf")) if t.is_floating_point() else t,
    lambda t: nn.Parameter(t.clone(), requires_grad=t.is_floating_point()),
    lambda t: t.clone().as_subclass(Subclass),
    lambda t: torch._neg_view(t) if t.is_floating_point() else t,
    lambda t: torch.conj(t),
    lambda t: t.to_sparse() if t.dim() else t,
    lambda t: t.to_sparse_csr() if t.dim() == 2 and not t.is_complex() else t,
    lambda t: t.float().to_mkldnn() if t.is_floating_point() and t.dim() else t,
    lambda t: t.tolist(),
    lambda t: t.double().numpy() if t.is_floating_point() else t.numpy(),
    lambda t: {"value": t},
    *(nested, quantized, uninitialized),
    *(lambda t, dtype=dtype: t.to(dtype) for dtype in DTYPES),
    *(lambda t, dtype=dtype: torch.empty(t.shape, dtype=dtype) for dtype in OPAQUE),
]
WRAPPERS: list[Callable[[Any], Any]] = [
    *(OrderedDict, UserDict, ChainMap, types.MappingProxyType),
    *(list, lambda d: list(d.items()), repr, lambda d: {**d, "x": d}),
]


def mangle(state: dict[str, Any], chance: random.Random) -> tuple[str, Any]:
    """What was done, and what became of the state."""

    def junk(*more: Any) -> Any:
        return copy.copy(chance.choice([*JUNK, *more]))

    places = {"state": state} | {k: v for k, v in state.items() if type(v) in (dict, OrderedDict)}
    where = chance.choice([*places, "state", "weights", "weights", "residuals", "schedule"])
    inside = places.get(where, state)
    names = [*inside] or [""]
    key, other = chance.choice(names), chance.choice([*names, *KEYS])
    tensors = [name for name in names if isinstance(inside.get(name), Tensor)]
    tensors = [] if where == "state" and "weights" in state else tensors
    what = chance.choice(["drop", "rename", "add", "junk", "move", "wrap"])
    if tensors and chance.random() < 0.5:
        key, number = chance.choice(tensors), chance.randrange(len(TENSORS))
        what = f"tensor {number} of"
        with suppress(RuntimeError):  # it is one already, of which no such thing can be made
            inside[key] = TENSORS[number](inside[key])
    elif what == "drop":
        inside.pop(key, None)
    elif what == "rename":
        inside[other] = inside.pop(key, None)
    elif what == "add":
        inside[chance.choice(KEYS)] = junk(torch.ones(4), state)
    elif what == "junk":
        inside[key] = junk(state, inside)
    elif what == "move":
        inside[key], inside[other] = inside.get(other), inside.get(key)
    elif what == "wrap":
        number = chance.randrange(len(WRAPPERS))
        wrapped = WRAPPERS[number](inside)
        what, state = f"wrap {number} of", {**state, where: wrapped}
        state = wrapped if inside is places["state"] else state
    return f"{what} {where}[{key!r}]", state


def valid_state(options: str) -> dict[str, Any]:
    donor = Subject(ModelEMA, OPTIONS[options])
    donor.emas[0].schedule = Delayed(LinearWarmup(0.5, 0.1, 7), 2)
    donor.go_on(2)
    return opened(donor.emas[0].state_dict(clone=True))


def fuzz(owner: type, options: str) -> dict[str, str]:
    """What is wrong, and what had been done to the state."""
    subject, valid = Subject(owner, OPTIONS[options]), valid_state(options)
    found = dict.fromkeys(subject.load(copy.deepcopy(valid)), "nothing")
    for case in range(CASES):
        chance = random.Random(f"{owner.__name__} {options} {case}")
        state: Any = copy.deepcopy(valid)
        if chance.random() < 0.1:
            state = state["weights"]
        done = []
        for _ in range(chance.choice([1, 1, 2, 3])):
            if type(state) in (dict, OrderedDict):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    step, state = mangle(state, chance)
                done.append(step)
        for problem in subject.load(state):
            found.setdefault(problem, f"case {case}: {', then '.join(done)}")
    return found


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("owner", OWNERS)
def test_a_mangled_state_is_loaded_whole_or_not_at_all(owner: type, options: str) -> None:
    assert fuzz(owner, options) == {}


@pytest.mark.parametrize("options", ["exact bfloat16", "stochastic bfloat16"])
@pytest.mark.parametrize("place", PLACES)
def test_junk_in_any_place_is_refused_or_means_what_it_says(place: str, options: str) -> None:
    """A place is a key, or keys, one in the other."""
    subject, valid, found = Subject(EMAHandler, OPTIONS[options]), valid_state(options), {}
    *outer, key = place.split(".")
    for number, junk in enumerate(JUNK):
        state = inside = copy.deepcopy(valid)
        if outer == ["random_state"]:
            state["random_state"] = {"seed": 5, "updates": 6}
        for name in outer:
            inside = inside[name]
        inside[key] = junk
        for problem in subject.load(state if key else junk):
            found.setdefault(problem, f"junk {number}, {type(junk).__name__}")
    assert found == {}


@pytest.mark.parametrize("options", ["exact bfloat16", "exact float16", "nearest bfloat16"])
@pytest.mark.parametrize("name", ["0.weight", "spin", "1.count", "2.running_mean"])
def test_every_kind_of_tensor_is_refused_or_loaded(name: str, options: str) -> None:
    subject, valid, found = Subject(EMAHandler, OPTIONS[options]), valid_state(options), {}
    alone = ["weights alone", "residuals"] if name in valid["residuals"] else []
    for part in ["weights", *alone]:
        for number, change in enumerate(TENSORS):
            state = copy.deepcopy(valid)
            if part == "weights alone":
                state["residuals"].pop(name, None)
            inside = state[part.split()[0]]
            with warnings.catch_warnings(), suppress(RuntimeError):
                warnings.simplefilter("ignore")
                inside[name] = change(inside[name])
            for problem in subject.load(state):
                found.setdefault(problem, f"{part}, {number}")
    assert found == {}


def test_there_are_many_cases() -> None:
    assert CASES * len(OWNERS) * len(OPTIONS) >= 2000


@pytest.mark.parametrize("broken", ["no check", "another precision"])
def test_a_loader_that_is_broken_is_noticed(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if broken == "no check":
        monkeypatch.setattr(SavedState, "check_matches", lambda *_: None)
        expected = ["loaded without 2.weight", "AssertionError", CHANGED]
    else:
        monkeypatch.setattr(SavedState, "value", lambda self, name, _: self.weights[name])
        expected = ["0.weight differs"]
    found = " ".join(fuzz(ModelEMA, "exact bfloat16"))
    assert all(problem in found for problem in expected)


def test_one_error_names_all_that_does_not_fit() -> None:
    subject = Subject(ModelEMA, OPTIONS["exact bfloat16"])
    state = copy.deepcopy(subject.start)
    weights = state["weights"]
    del weights["0.bias"], weights["3.weight"]
    weights["5.weight"], weights["0.weight"] = torch.ones(1), torch.ones(2, 2)
    weights["spin"], weights["1.count"] = torch.ones(2), [5]
    before = subject.picture()
    with pytest.raises(ValueError, match="does not fit this EMA model") as caught:
        subject.owners[0].load_state_dict(state)
    for text in (
        "'0.bias' is missing",
        "'3.weight' is missing",
        "'5.weight' is unexpected",
        "'0.weight' is (2, 2) in the state but (4, 3) here",
        "'spin' is torch.float32 in the state but torch.complex64 here",
        "'1.count' is a list, not a tensor",
        "Nothing was loaded",
    ):
        assert text in str(caught.value)
    assert same(subject.picture(), before)


def test_no_hook_of_a_module_is_called() -> None:
    subject, donor = (Subject(ModelEMA, OPTIONS["exact bfloat16"]) for _ in range(2))
    donor.go_on(2)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError

    for module in subject.emas[0].ema_model.modules():
        module.register_load_state_dict_pre_hook(fail)
        module.register_load_state_dict_post_hook(fail)
        module.register_state_dict_pre_hook(fail)
        module.register_state_dict_post_hook(fail)
    subject.owners[0].load_state_dict(donor.emas[0].state_dict())
    assert same(subject.emas[0].state_dict(), donor.emas[0].state_dict())


def test_names_that_a_hook_changed_are_an_error_that_lists_both() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))

    def rename(module: nn.Module, state: dict, prefix: str, metadata: object) -> None:
        state[f"{prefix}kernel"] = state.pop(f"{prefix}weight")

    model[0].register_state_dict_post_hook(rename)
    ema = ModelEMA(model)
    with pytest.raises(ValueError, match=r"'0\.weight' is missing.*'0\.kernel' is unexpected"):
        ema.load_weights(model.state_dict())
    assert [*ema.state_dict()["weights"]] == ["0.weight"]


def test_a_state_may_share_the_emas_own_memory() -> None:
    """Here two names have changed places."""
    for options in OPTIONS.values():
        ema = ModelEMA(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), **options)
        state, before = ema.state_dict(), ema.state_dict(clone=True)
        for part in (state["weights"], state["residuals"]):
            if part:
                part["0.weight"], part["1.weight"] = part["1.weight"], part["0.weight"]
        ema.load_state_dict(state)
        after = ema.state_dict()
        assert same(after["weights"]["0.weight"], before["weights"]["1.weight"]), options
        assert same(after["weights"]["1.weight"], before["weights"]["0.weight"]), options


@pytest.mark.parametrize("options", ["float32", "exact bfloat16", "stochastic float16"])
def test_a_damaged_file_is_loaded_whole_or_not_at_all(options: str) -> None:
    subject, donor = Subject(ModelEMA, OPTIONS[options]), Subject(EMAHandler, OPTIONS[options])
    donor.go_on(2)
    file, chance = io.BytesIO(), random.Random(options)
    torch.save(donor.owners[0].state_dict(), file)
    whole, read, problems = file.getvalue(), 0, {}
    damaged = [whole[: chance.randrange(len(whole))] for _ in range(60)]
    for _ in range(200):
        copied = bytearray(whole)
        for _ in range(chance.choice([1, 1, 2, 20])):
            copied[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        damaged.append(bytes(copied))
    assert subject.load(torch.load(io.BytesIO(whole), weights_only=True)) == []
    for number, content in enumerate(damaged):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                state = torch.load(io.BytesIO(content), weights_only=True)
        except Exception:  # torch's own
            continue
        read += 1
        for problem in subject.load(state):
            problems.setdefault(problem, number)
    assert 0 < read < 200
    assert problems == {}
