"""Evaluating the online model with the EMA's weights: `swapped`, and `attach_swap` with Ignite."""

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from ema_triton import ModelEMA
from ema_triton.state import CHUNK

pytest.importorskip("ignite")
pytest.importorskip("triton")

from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver

from ema_triton import EMAHandler

BACKENDS = ("foreach", "triton")
DTYPES = [(dtype, None) for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)]
DTYPES += [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)
        self.wide = nn.Linear(100, 100, bias=False)
        self.tied = nn.Linear(100, 100, bias=False)
        self.tied.weight = self.wide.weight
        self.frozen = nn.Parameter(torch.randn(7), requires_grad=False)
        self.scalar = nn.Parameter(torch.tensor(1.0))
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.register_buffer("steps", torch.tensor(0))


def trained(dtype: torch.dtype = torch.float32, **options: Any) -> ModelEMA:
    torch.manual_seed(0)
    model = Net().to(dtype)
    if options.get("backend") == "triton" and torch.cuda.is_available():
        model = model.cuda()
    ema = ModelEMA(model, **options)
    train(ema)
    return ema


def train(ema: ModelEMA, updates: int = 2) -> None:
    for update in range(updates):
        with torch.no_grad():
            for tensor in ema.model.state_dict().values():
                tensor.add_(1 + update)
        ema.update(0.3)


def contents(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name].to(left[name].dtype)) for name in left
    )


def addresses(model: nn.Module) -> list[tuple[int, int]]:
    return [(id(t), t.data_ptr()) for t in (*model.parameters(), *model.buffers())]


@pytest.mark.parametrize("handle_buffers", ["copy", "update", "ema_train"])
@pytest.mark.parametrize(("dtype", "ema_dtype"), DTYPES)
@pytest.mark.parametrize("precision", ["exact", "stochastic"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_online_model_has_the_emas_values_and_then_its_own(
    backend: str,
    precision: str,
    dtype: torch.dtype,
    ema_dtype: torch.dtype | None,
    handle_buffers: str,
) -> None:
    ema = trained(
        dtype,
        ema_dtype=ema_dtype,
        precision=precision,
        backend=backend,
        handle_buffers=handle_buffers,
    )
    twin = copy.deepcopy(ema)
    online, averaged = contents(ema.model), contents(ema.ema_model)
    assert not same(online, averaged)
    before = addresses(ema.model) + addresses(ema.ema_model)
    outside = ema.state_dict(clone=True)
    with ema.swapped() as model:
        assert model is ema.model
        assert same(contents_quietly(model), averaged)
        inside = ema.state_dict()
        assert same(inside["weights"], outside["weights"])
        assert same(inside["residuals"], outside["residuals"])
        rest = {"weights", "residuals"}
        assert {k: v for k, v in inside.items() if k not in rest} == {
            k: v for k, v in outside.items() if k not in rest
        }
    assert same(contents(ema.model), online)
    assert same(contents(ema.ema_model), averaged)
    assert addresses(ema.model) + addresses(ema.ema_model) == before
    # And goes on as if nothing had been, with all its digits.
    for one in (ema, twin):
        train(one)
    ours, theirs = ema.state_dict(), twin.state_dict()
    assert same(ours["weights"], theirs["weights"])
    assert same(ours["residuals"], theirs["residuals"])


def contents_quietly(model: nn.Module) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return contents(model)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_any_exception_swaps_back_and_goes_on(error: type[BaseException]) -> None:
    ema = trained()
    online = contents(ema.model)
    with pytest.raises(error), ema.swapped():
        raise error
    assert same(contents(ema.model), online)


CALLS: dict[str, Callable[[ModelEMA], object]] = {
    "update()": lambda ema: ema.update(0.1),
    "sync()": lambda ema: ema.sync(),
    "swapped()": lambda ema: ema.swapped().__enter__(),
    "load_state_dict()": lambda ema: ema.load_state_dict(ema.state_dict()),
    "distance()": lambda ema: ema.distance(),
    "copy_to()": lambda ema: ema.copy_to(Net()),
    "copying or pickling the EMA": copy.deepcopy,
    "copying or pickling the EMA ": pickle.dumps,
}


@pytest.mark.parametrize("call", CALLS)
def test_inside_a_swap_much_is_refused(call: str) -> None:
    ema = trained()
    online, averaged = contents(ema.model), contents(ema.ema_model)
    with ema.swapped():
        with pytest.raises(RuntimeError) as caught:
            CALLS[call](ema)
        assert str(caught.value).startswith(f"{call.strip()} while the models' weights are swapped")
        assert same(contents_quietly(ema.model), averaged)
    assert same(contents(ema.model), online)
    assert same(contents(ema.ema_model), averaged)
    CALLS["update()"](ema)


def test_an_optimizers_step_inside_is_warned_of_and_goes_into_the_ema() -> None:
    ema = trained(torch.bfloat16)
    online = contents(ema.model)
    optimizer = torch.optim.SGD(ema.model.parameters(), lr=1.0)

    def inside() -> Tensor:
        with ema.swapped() as model:
            optimizer.step()
            return model.conv.weight.detach().clone()

    ema.model.conv.weight.grad = torch.ones_like(ema.model.conv.weight)
    with pytest.warns(UserWarning, match=r"'conv.weight' was written, or replaced, while"):
        written = inside()
    assert same(contents(ema.model), online)
    assert torch.equal(ema.ema_model.conv.weight, written)
    # The EMA goes on from a value that rounds to what was written.
    ema.update(0.0)
    assert torch.equal(ema.ema_model.conv.weight, written)


def replace(model: nn.Module) -> None:
    model.wide.weight = nn.Parameter(torch.zeros(100, 100))


@pytest.mark.parametrize(
    "change", [lambda m: m.half(), lambda m: m.double(), replace], ids=["half", "double", "replace"]
)
def test_what_is_cast_or_replaced_inside_is_as_before(
    change: Callable[[nn.Module], object],
) -> None:
    ema = trained()
    online, averaged, before = contents(ema.model), contents(ema.ema_model), addresses(ema.model)

    def inside() -> None:
        with ema.swapped() as model:
            change(model)

    with pytest.warns(UserWarning, match="weight'.* was written, or replaced") as warned:
        inside()
    assert len(warned) == 1
    assert addresses(ema.model) == before
    assert same(contents(ema.model), online)
    assert {t.dtype for t in ema.model.parameters()} == {torch.float32}
    assert same(contents(ema.ema_model), averaged)


WRITTEN = r"'norm.num_batches_tracked'.* was written while .*what was written is lost"


@pytest.mark.parametrize("handle_buffers", ["copy", "update", "ema_train"])
def test_a_model_evaluated_in_train_mode_keeps_its_buffers_and_is_warned_of(
    handle_buffers: str,
) -> None:
    ema = trained(handle_buffers=handle_buffers)
    online = contents(ema.model)

    def inside() -> None:
        with ema.swapped() as model:
            model.norm.train()(torch.randn(5, 4, 2, 2))
            model.steps = model.steps + 1  # a module may well replace its buffer

    with pytest.warns(UserWarning, match=WRITTEN) as warned:
        inside()
    (text,) = (str(one.message) for one in warned)
    assert "'steps'" in text
    assert "call eval() before evaluating" in text
    # Averaged ones change places, and so what is written into them is not lost.
    went = text.startswith("'norm.running_mean', 'norm.running_var' was written, or replaced")
    assert went == (handle_buffers == "update")
    assert text.count("'norm.running_mean', 'norm.running_var'") == 1
    assert same(contents(ema.model), online)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({}, r"update_bn\(loader, ema\.ema_model\)"),
        ({"as_module": False}, r"update_bn\(loader, copy\.deepcopy\(model\)\)"),
    ],
)
def test_statistics_estimated_anew_inside_are_lost_and_the_warning_says_where_to(
    options: dict[str, Any], place: str, mode: bool
) -> None:
    ema, loader = norm_ema(**options)
    ema.model.train(mode)
    before = contents(ema.model)
    averaged = {name: value.clone() for name, value in ema.state_dict()["weights"].items()}

    def inside() -> nn.Sequential:
        with ema.swapped() as model:
            update_bn(loader, model)
            return copy.deepcopy(model)

    with pytest.warns(UserWarning, match="is lost.*" + place) as warned:
        copied = inside()
    assert len(warned) == 1
    assert "'1.running_mean', '1.running_var', '1.num_batches_tracked'" in str(warned[0].message)
    assert "'0." not in str(warned[0].message)
    assert same(contents(ema.model), before)
    assert same(ema.state_dict()["weights"], averaged)
    # What the warning recommends.
    estimated = copied[1].running_mean.clone()
    if "as_module" not in options:
        update_bn(loader, ema.ema_model)
        copied = ema.ema_model
    assert torch.equal(copied[1].running_mean, estimated)
    assert not torch.equal(estimated, averaged["1.running_mean"])


def norm_ema(**options: Any) -> tuple[ModelEMA, list[Tensor]]:
    torch.manual_seed(0)
    ema = ModelEMA(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), **options)
    ema.model[0].weight.data.add_(1.0)
    ema.update(0.5)
    return ema, [torch.randn(8, 3) for _ in range(4)]


def evaluate(ema: ModelEMA) -> None:
    with ema.swapped() as model:
        model(torch.ones(2, 3))


def test_an_evaluation_in_eval_mode_does_not_warn() -> None:
    class Counting(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(3, 4), nn.BatchNorm1d(4))
            self.register_buffer("calls", torch.tensor(0))
            self.register_buffer("cache", torch.zeros(1), persistent=False)

        def forward(self, inputs: Tensor) -> Tensor:
            self.calls += 1
            self.cache += 1
            return super().forward(inputs)

    for handle_buffers in ("copy", "update", "ema_train"):
        ema = ModelEMA(Counting(), handle_buffers=handle_buffers)
        model = ema.model.eval()
        evaluate(ema)
        assert model.calls == 0
        # The control: what is not persistent does not count in train mode either.
        model.train()[1].eval()
        with pytest.warns(UserWarning, match=r"^'calls' was written while"):
            evaluate(ema)
        assert model.calls == 0


def test_what_is_written_into_an_online_tensor_of_another_dtype_is_lost() -> None:
    """It is copied over, and does not change places with the EMA's."""
    ema = trained(torch.bfloat16, ema_dtype=torch.float32)
    averaged = contents(ema.ema_model)

    def inside() -> None:
        with ema.swapped() as model, torch.no_grad():
            model.conv.weight.add_(1)

    with pytest.warns(UserWarning, match=r"^'conv.weight' was written while .* is lost"):
        inside()
    assert same(contents(ema.ema_model), averaged)


def test_an_evaluator_that_leaves_the_model_in_train_mode_is_warned_of() -> None:
    model = nn.BatchNorm1d(3)
    handler = EMAHandler(model)
    evaluator = Engine(lambda engine, batch: model(batch))
    handler.attach_swap(evaluator)
    with pytest.warns(UserWarning, match=r"^'running_mean', 'running_var', .* is lost"):
        evaluator.run([torch.randn(4, 3)] * 2)
    model.eval()
    evaluator.run([torch.randn(4, 3)] * 2)


def test_the_online_models_state_inside_is_warned_of() -> None:
    ema = trained()
    with ema.swapped(), pytest.warns(UserWarning, match="while it holds the EMA's weights"):
        ema.model.state_dict()
    ema.model.state_dict()


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_that_several_online_tensors_share_comes_back(backend: str) -> None:
    storage = torch.arange(12.0)
    model = nn.ParameterList([torch.empty(0) for _ in range(3)])
    model[0].data, model[1].data, model[2].data = storage[:8], storage[4:], torch.ones(4)
    ema = ModelEMA(model, backend=backend)
    with ema.swapped():
        assert torch.equal(storage, torch.arange(12.0))
    with torch.no_grad():
        storage.add_(1)
        ema.ema_model[0].fill_(7)
    before = [tensor.detach().clone() for tensor in (*model, *ema.ema_model)]
    with pytest.raises(ValueError, match=r"shares its memory with .* cannot hold both"):
        ema.swapped().__enter__()
    assert all(map(torch.equal, (*model, *ema.ema_model), before))
    ema.update(0.5)


def test_an_expanded_tensor_is_an_error() -> None:
    model = nn.ParameterList([torch.ones(4), torch.empty(0)])
    model[1].data = torch.ones(1).expand(5)
    ema = ModelEMA(model)
    with pytest.raises(ValueError, match="is expanded: several of its elements share one place"):
        ema.swapped().__enter__()
    ema.update(0.5)


def test_on_a_cpu_it_takes_a_chunk_of_extra_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    ema = ModelEMA(nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300)))
    taken = []
    right = Tensor.new_empty

    def noted(tensor: Tensor, *shape: int, **options: Any) -> Tensor:
        taken.append(right(tensor, *shape, **options))
        return taken[-1]

    monkeypatch.setattr(Tensor, "new_empty", noted)
    monkeypatch.setattr(Tensor, "clone", pytest.fail)
    with ema.swapped():
        pass
    # In turns: one on the way in, one on the way back.
    assert [tensor.numel() for tensor in taken] == [CHUNK, CHUNK]


class Evaluation:
    """An evaluator that notes whether it saw the EMA's weights."""

    def __init__(self, **options: Any) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        self.model.weight.data.fill_(1.0)
        self.handler = EMAHandler(self.model, **options)
        self.handler.ema_model.weight.data.fill_(2.0)
        self.seen: list[float] = []
        self.evaluator = Engine(self.step)
        self.handler.attach_swap(self.evaluator)

    def step(self, engine: Engine, batch: object) -> None:
        self.seen.append(self.model.weight.item())
        if isinstance(batch, BaseException):
            raise batch
        if callable(batch):
            batch(engine)

    @property
    def online(self) -> float:
        return self.model.weight.item()


def test_each_run_evaluates_the_ema() -> None:
    found = Evaluation()
    for runs in (1, 2, 3):
        found.evaluator.run([0, 0], max_epochs=2)
        assert found.seen == [2.0] * 4 * runs
        assert found.online == 1.0


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_run_that_fails_swaps_back_and_raises(error: BaseException) -> None:
    found = Evaluation()
    with pytest.raises(type(error)):
        found.evaluator.run([0, error, 0])
    assert (found.seen, found.online) == ([2.0, 2.0], 1.0)
    found.evaluator.run([0])
    assert found.seen[-1] == 2.0


def test_who_else_listens_to_exceptions_decides() -> None:
    found, heard = Evaluation(), []
    found.evaluator.add_event_handler(
        Events.EXCEPTION_RAISED, lambda engine, error: heard.append((found.online, str(error)))
    )
    found.evaluator.run([ValueError("no")])
    assert heard[0] == (1.0, "no")
    assert found.online == 1.0


@pytest.mark.parametrize("skip_completed", [False, True])
def test_a_run_that_is_terminated_swaps_back(skip_completed: bool) -> None:
    found = Evaluation()
    found.evaluator.run([0, lambda engine: engine.terminate(skip_completed=skip_completed), 0])
    assert (found.seen, found.online) == ([2.0, 2.0], 1.0)


def test_a_run_that_is_interrupted_swaps_back_and_again_when_it_goes_on() -> None:
    found = Evaluation()
    found.evaluator.run([0, lambda engine: engine.interrupt(), 0], max_epochs=1)
    assert (found.seen, found.online) == ([2.0, 2.0], 1.0)
    found.evaluator.run([0, 0, 0], max_epochs=1)
    assert (found.seen, found.online) == ([2.0] * 3, 1.0)


def test_a_checkpoint_of_the_best_model_saves_the_online_weights_and_is_warned_of(
    tmp_path: Path,
) -> None:
    model = nn.Linear(1, 1, bias=False)
    handler = EMAHandler(model)
    model.weight.data.fill_(1.0)
    evaluator = Engine(lambda engine, batch: model.weight.item())
    saver = Checkpoint({"model": model}, DiskSaver(tmp_path), score_function=lambda engine: 1.0)
    evaluator.add_event_handler(Events.COMPLETED, saver)
    with pytest.warns(UserWarning, match="saves the online model .* under the EMA's score"):
        handler.attach_swap(evaluator)
    evaluator.run([0])
    (path,) = tmp_path.iterdir()
    assert torch.load(path)["weight"].item() == 1.0
    assert evaluator.state.output != 1.0


def test_an_evaluator_runs_inside_the_trainer() -> None:
    found = Evaluation(momentum=0.5)
    trainer = Engine(lambda engine, batch: found.model.weight.data.add_(1.0).item())
    found.handler.attach(trainer)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: found.evaluator.run([0]))
    trainer.run([0], max_epochs=3)
    # From 2: halfway to 2, 3 and 4.
    assert found.seen == [2.0, 2.5, 3.25]
    assert found.online == 4.0


def test_detached_it_evaluates_the_online_model_and_raises() -> None:
    found = Evaluation()
    found.handler.detach()
    found.evaluator.run([0])
    assert found.seen == [1.0]
    with pytest.raises(ValueError, match="no"):
        found.evaluator.run([ValueError("no")])


def test_detached_inside_a_run_it_swaps_back() -> None:
    found = Evaluation()
    found.evaluator.run([lambda engine: found.handler.detach(), 0])
    assert found.seen == [2.0, 1.0]


def test_engines_that_cannot_be_swapped_around() -> None:
    found, trainer = Evaluation(), Engine(lambda engine, batch: None)
    with pytest.raises(RuntimeError, match="swaps on this engine already"):
        found.handler.attach_swap(found.evaluator)
    with pytest.raises(RuntimeError, match="swaps on this engine already"):
        found.handler.attach(found.evaluator)
    found.handler.attach(trainer)
    with pytest.raises(RuntimeError, match="updates on this engine already"):
        found.handler.attach_swap(trainer)
    with pytest.raises(TypeError, match="evaluator must be an Ignite Engine, but got Linear"):
        found.handler.attach_swap(found.model)
