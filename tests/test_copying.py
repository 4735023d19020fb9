"""The copy that becomes the EMA model: what can be copied all the same, and what cannot."""

import copy
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_triton import ModelEMA
from tests import ranks
from tests.plain import assert_same, move

REMEDY = r"as_module=False.*swapped\(\).*or give an ema_model, another instance"


def handler_of(model: nn.Module, **options: Any) -> Any:
    """An EMAHandler; where ignite is absent the test is skipped."""
    pytest.importorskip("ignite")
    from ema_triton import EMAHandler

    return EMAHandler(model, **options)


def evaluates_as_the_swapped_model(ema: ModelEMA, inputs: Tensor) -> bool:
    """Whether the EMA model computes what the online model does with the EMA's weights.

    The online model has other weights then, and computes something else: the control.
    """
    for step in range(3):
        move(ema.model, step)
        ema.update(0.3)
    with torch.no_grad():
        found = ema.ema_model(inputs)
        ema.model.eval()
        assert not torch.allclose(found, ema.model(inputs))
        with ema.swapped() as model:
            return torch.equal(found, model(inputs))


class Net(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs).tanh())


INPUTS = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def test_computed_tensors_are_copied_without_their_graph() -> None:
    model = Net()
    kept = model(INPUTS)
    model.last = kept
    model.body.seen = {"outputs": [kept, kept * 2], "count": 3}
    ema = ModelEMA(model).ema_model
    assert torch.equal(ema.last, kept)
    assert ema.last.is_leaf
    assert not ema.last.requires_grad
    assert ema.last.untyped_storage().data_ptr() != kept.untyped_storage().data_ptr()
    assert ema.body.seen["outputs"][0] is ema.last
    assert torch.equal(ema.body.seen["outputs"][1], kept * 2)
    assert ema.body.seen["count"] == 3
    assert model.last is kept
    kept.sum().backward()  # its graph is as it was
    assert model.body.weight.grad is not None


def test_computed_buffers_are_copied_without_their_graph() -> None:
    model = Net()
    model.register_buffer("cache", model.body.weight * 2, persistent=False)
    ema = ModelEMA(model)
    assert torch.equal(ema.ema_model.cache, model.cache)
    assert ema.ema_model.cache.is_leaf
    ema.update(0.5)


@pytest.mark.parametrize("graph", [True, False])
def test_a_kept_view_of_a_weight_is_a_view_of_the_emas_weight(graph: bool) -> None:
    model = Net()
    with torch.set_grad_enabled(graph):
        model.turned = model.body.weight.t()
        model.rows = model.body.weight[1:3]
    ema = ModelEMA(model)
    move(model, 0)
    ema.update(0.3)
    assert not torch.equal(ema.ema_model.body.weight, model.body.weight)
    assert torch.equal(ema.ema_model.turned, ema.ema_model.body.weight.t())
    assert torch.equal(ema.ema_model.rows, ema.ema_model.body.weight[1:3])
    assert torch.equal(model.turned, model.body.weight.t())


def test_a_kept_view_of_a_weight_that_lies_otherwise_in_the_ema_is_copied() -> None:
    model = Net()
    model.body.weight = nn.Parameter(torch.randn(4, 8)[:, ::2])  # the EMA's has no gaps
    model.turned = model.body.weight.t()
    ema = ModelEMA(model).ema_model
    assert torch.equal(ema.turned, model.turned)
    assert ema.turned.is_leaf


def pruned(model: Net) -> None:
    from torch.nn.utils import prune

    prune.l1_unstructured(model.body, "weight", amount=0.5)
    prune.random_unstructured(model.head, "bias", amount=1)


NORMS: dict[str, Callable[[Net], object]] = {
    "nothing": lambda model: None,
    "pruning": pruned,
    "old weight_norm": lambda model: nn.utils.weight_norm(model.body),
    "old spectral_norm": lambda model: nn.utils.spectral_norm(model.body),
    "weight_norm": lambda model: nn.utils.parametrizations.weight_norm(model.body),
    "spectral_norm": lambda model: nn.utils.parametrizations.spectral_norm(model.body),
    "orthogonal": lambda model: nn.utils.parametrizations.orthogonal(model.body),
}


@pytest.mark.parametrize("after_forward", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.spectral_norm` is deprecated")
def test_a_model_with_computed_weights_evaluates_as_it_does_swapped(
    norm: str, after_forward: bool
) -> None:
    model = Net()
    NORMS[norm](model)
    if after_forward:
        model(INPUTS).sum().backward()
    assert evaluates_as_the_swapped_model(ModelEMA(model), INPUTS)


class Holding(nn.Module):
    """A module whose submodule holds a thing."""

    def __init__(self, thing: object) -> None:
        super().__init__()
        self.body = nn.Linear(2, 2)
        self.body.held = thing


class Recorder:
    """An object that cannot be copied for what it has."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


def recursive() -> list[object]:
    thing: list[object] = [1]
    thing += [thing, threading.Lock()]
    return thing


THINGS: dict[str, tuple[Callable[[], object], str]] = {
    "a lock": (threading.Lock, r"'body\.held' is a _thread\.lock"),
    "an open file": (
        lambda: io.TextIOWrapper(io.BytesIO()),
        r"'body\.held' is a _io\.TextIOWrapper",
    ),
    "a generator": (lambda: iter(i for i in "ab"), r"'body\.held' is a generator"),
    "in a dict": (
        lambda: {"n": 1, "locks": [2, threading.Lock()]},
        r"'body\.held\['locks'\]\[1\]' is a _thread\.lock",
    ),
    "in an object": (Recorder, r"'body\.held' is a .*test_copying\.Recorder"),
    "an object in a list": (lambda: [1, Recorder()], r"'body\.held\[1\]' is a .*Recorder"),
    "in a list that holds itself": (recursive, r"'body\.held\[2\]' is a _thread\.lock"),
}


@pytest.mark.parametrize("build", [ModelEMA, handler_of])
@pytest.mark.parametrize("name", THINGS)
def test_what_cannot_be_copied_is_named_with_its_type(name: str, build: Any) -> None:
    make, text = THINGS[name]
    model = Holding(make())
    before = {**vars(model), **vars(model.body)}
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=rf"(?s)cannot be copied.*{text}.*{REMEDY}") as caught:
        build(model)
    assert "computed" not in str(caught.value)
    assert isinstance(caught.value.__cause__, Exception)
    assert {**vars(model), **vars(model.body)} == before
    assert_same(model.state_dict(), weights)
    for options in ({"as_module": False}, {"ema_model": Holding(make())}):
        built = build(model, **options)
        ema = built if isinstance(built, ModelEMA) else built.ema
        move(model, 1)
        expected = torch.lerp(
            ema.state_dict(clone=True)["weights"]["body.bias"], model.body.bias, 0.5
        )
        ema.update(0.5)
        assert torch.equal(ema.state_dict()["weights"]["body.bias"], expected)
        with ema.swapped():
            assert torch.equal(model.body.bias, expected)


def test_a_module_that_refuses_to_be_copied_is_named() -> None:
    class Refusing(nn.Linear):
        def __deepcopy__(self, memo: object) -> None:
            raise TypeError("not this one")

    text = r"'1' is a .*Refusing.*not this one"
    with pytest.raises(RuntimeError, match=rf"(?s)cannot be copied.*{text}.*{REMEDY}"):
        ModelEMA(nn.Sequential(nn.Linear(2, 2), Refusing(2, 2)))
    with pytest.raises(RuntimeError, match=r"(?s)cannot be copied.*: it is a .*not this one"):
        ModelEMA(Refusing(2, 2))


def with_process_groups() -> None:
    group = torch.distributed.new_group([0, 1])
    model = nn.Sequential(nn.SyncBatchNorm(2, process_group=group), nn.Linear(2, 2))
    model[1].groups = {"data": [group], "world": torch.distributed.group.WORLD}
    ema = ModelEMA(model)
    assert ema.ema_model[0].process_group is group
    assert ema.ema_model[1].groups == model[1].groups
    assert ema.ema_model[1].groups is not model[1].groups
    move(model, torch.distributed.get_rank())
    ema.update(1.0)
    assert_same(ema.ema_model.state_dict(), model.state_dict())


@pytest.mark.distributed
def test_a_copy_is_in_the_same_process_groups() -> None:
    ranks.run(2, with_process_groups)


class Attached(Net):
    """A module that lets go of its trainer when it is copied, as Lightning's do."""

    def __init__(self) -> None:
        super().__init__()
        self.trainer: object = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "trainer": None}


def test_what_a_copy_does_not_take_along_is_not_looked_at() -> None:
    model = Attached()
    model.trainer = {"lock": threading.Lock(), "evaluate": lambda: model(INPUTS)}
    ema = ModelEMA(model)  # a warning is an error
    assert ema.ema_model.trainer is None
    assert evaluates_as_the_swapped_model(ema, INPUTS)
    model.held = threading.Lock()
    with pytest.raises(RuntimeError, match=r"'held' is a _thread\.lock"):
        ModelEMA(model)


def test_a_kept_conjugate_is_copied() -> None:
    model = nn.ParameterDict({"phase": torch.randn(3, dtype=torch.complex64)})
    vars(model)["kept"] = {"conj": model["phase"].conj(), "first": model["phase"][:2]}
    ema = ModelEMA(model)
    assert torch.equal(ema.ema_model.kept["conj"], model["phase"].conj())
    move(model, 0)
    ema.update(0.3)
    assert torch.equal(ema.ema_model.kept["first"], ema.ema_model["phase"][:2])


@pytest.mark.parametrize("ema_dtype", [torch.float64, torch.bfloat16])
def test_a_kept_view_has_the_emas_dtype(ema_dtype: torch.dtype) -> None:
    model = Net()
    model.rows = model.body.weight[1:3]
    ema = ModelEMA(model, ema_dtype=ema_dtype)
    move(model, 0)
    ema.update(0.3)
    assert ema.ema_model.rows.dtype == ema_dtype
    assert torch.equal(ema.ema_model.rows, ema.ema_model.body.weight[1:3])


def with_shards() -> None:
    from torch.distributed.fsdp import fully_shard

    model = Holding(threading.Lock())
    forward = model.body.forward
    model.forward = lambda inputs: forward(inputs)
    fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    ema = ModelEMA(model)
    ema.update(0.5)
    with ema.swapped():
        model(torch.ones(1, 2))


@pytest.mark.distributed
def test_a_sharded_model_is_not_copied_so_that_nothing_is_refused() -> None:
    ranks.run(2, with_shards)


def test_plain_attributes_stay_as_they_were_copied() -> None:
    model = nn.Linear(2, 1)
    model.alpha, model.table = 0.5, torch.zeros(3)
    ema = ModelEMA(model)
    model.alpha = 2.0
    model.table += 1
    ema.update(0.5)
    assert ema.ema_model.alpha == 0.5
    assert ema.ema_model.table.tolist() == [0, 0, 0]
    assert ema.state_dict()["weights"].keys() == {"weight", "bias"}
