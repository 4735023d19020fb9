"""timm's train script and tasks with `ModelEmaV3`: validated, saved, crashed and resumed."""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ema_triton import ModelEMA
from ema_triton.integrations.timm import ModelEmaV3
from tests.integrations import with_timm
from tests.integrations.walks import assert_equal
from tests.ranks import run

timm = with_timm.require()
TimmEma, CheckpointSaver = timm.utils.ModelEmaV3, timm.utils.CheckpointSaver
ClassificationTask = timm.task.ClassificationTask
load_checkpoint, load_state_dict = timm.models.load_checkpoint, timm.models.load_state_dict
resume_task_checkpoint = timm.task.resume_task_checkpoint
load_task_ema_checkpoint = timm.task.load_task_ema_checkpoint

MODEL = "test_resnet"
BATCHES = 5
SIZE = 8
ACCUMULATED = 2  # so that an epoch has three updates, the last of one batch
UPDATES_PER_EPOCH = 3


class CrashError(Exception):
    pass


def batches(epoch: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(epoch)
    return [
        (
            torch.randn(4, 3, SIZE, SIZE, generator=generator).to(dtype),
            torch.randint(4, (4,), generator=generator),
        )
        for _ in range(BATCHES)
    ]


class Small(nn.Sequential):
    """As `MODEL`, in a fraction of the time."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)
        )
        self(torch.zeros(1, 3, SIZE, SIZE))


def create(dtype: torch.dtype, name: str) -> nn.Module:
    torch.manual_seed(0)
    return (timm.create_model(name, num_classes=4) if name else Small()).to(dtype)


def validate(model: nn.Module, dtype: torch.dtype) -> float:
    model.eval()
    with torch.inference_mode():
        losses = [nn.functional.cross_entropy(model(x), y) for x, y in batches(99, dtype)[:2]]
    return torch.stack(losses).mean().item()


class Script:
    """timm's train.py, as it is for one process, before and with its tasks.

    Args:
        folder: For checkpoints.
        ema_class: timm's `ModelEmaV3`, or the one to be tested.
        resume: A checkpoint.
        by_task: Whether a task builds and updates the EMA, as in the script since 1.0.27.
        compiled: Whether models are compiled.
        dtype: Of the model.
        name: Of the model, if it is one of timm's.
        after_update: Called with the number of updates; may raise.
        validate: Of the EMA.
    """

    def __init__(
        self,
        folder: Path,
        ema_class: Callable[..., nn.Module],
        *,
        resume: str = "",
        by_task: bool = False,
        compiled: bool = False,
        dtype: torch.dtype = torch.float32,
        name: str = "",
        after_update: Callable[[int], object] = lambda number: None,
        validate: Callable[[nn.Module, torch.dtype], float] = validate,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.dtype, self.after_update, self.validate = dtype, after_update, validate
        self.model = create(dtype, name)
        self.task = ClassificationTask(self.model, nn.CrossEntropyLoss(), verbose=False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.start_epoch = 0
        if resume and by_task:
            self.start_epoch = resume_task_checkpoint(self.task, resume, self.optimizer)
        elif resume:
            self.start_epoch = timm.models.resume_checkpoint(self.model, resume, self.optimizer)
        options = {"decay": 0.9, "use_warmup": True, "device": None}
        if by_task:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("timm.task.task.ModelEmaV3", ema_class)
                self.ema = self.task.setup_ema(**options)
            assert type(self.ema) is ema_class
            if resume:
                load_task_ema_checkpoint(self.task, resume)
            if compiled:
                self.task.compile(backend="eager")
                self.task.compile_ema(backend="eager")
            self.eval_ema = self.task.get_eval_model(ema=True)
        else:
            self.ema = ema_class(self.model, **options)
            if resume:
                load_checkpoint(self.ema.module, resume, use_ema=True)
            self.eval_ema = self.ema
            if compiled:
                self.task.trainable_module = torch.compile(self.model, backend="eager")
                self.eval_ema = self.ema = torch.compile(self.ema, backend="eager")
        self.by_task = by_task
        self.saver = CheckpointSaver(
            self.task.get_trainable_module(),
            self.optimizer,
            args=argparse.Namespace(model=name),
            checkpoint_dir=str(folder),
            recovery_dir=str(folder),
            max_history=2,
            decreasing=True,
            **({"task": self.task} if by_task else {"model_ema": self.ema}),
        )
        self.metrics: list[float] = []

    def train(self, epochs: int) -> "Script":
        for epoch in range(self.start_epoch, epochs):
            self.train_one_epoch(epoch)
            self.metrics.append(self.validate(self.eval_ema, self.dtype))
            self.saver.save_checkpoint(epoch, metric=self.metrics[-1])
        return self

    def train_one_epoch(self, epoch: int) -> None:
        model = self.task.get_trainable_module()
        model.train()
        number = epoch * UPDATES_PER_EPOCH
        self.optimizer.zero_grad()
        for index, (x, y) in enumerate(batches(epoch, self.dtype)):
            last = index == BATCHES - 1
            (self.task(x, y)["loss"] / (1 if last else ACCUMULATED)).backward()
            if not last and (index + 1) % ACCUMULATED:
                continue
            number += 1
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.by_task:
                self.task.update_ema(step=number)
            else:
                self.ema.update(model, step=number)
            self.after_update(number)


def read(folder: Path, name: str = "last") -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(folder / f"{name}.pth.tar", weights_only=True)


HOW = [
    pytest.param({}, id="script"),
    pytest.param({"by_task": True}, id="task"),
    pytest.param({"compiled": True}, id="compiled", marks=pytest.mark.integration),
    pytest.param(
        {"by_task": True, "compiled": True}, id="compiled task", marks=pytest.mark.integration
    ),
]


@pytest.mark.parametrize("how", HOW)
def test_the_train_script_writes_what_it_writes_with_timms_own_ema(
    how: dict[str, bool], tmp_path: Path
) -> None:
    ours = Script(tmp_path / "ours", ModelEmaV3, **how).train(2)
    peer = Script(tmp_path / "peer", TimmEma, **how).train(2)
    assert ours.metrics == peer.metrics
    assert len({*ours.metrics}) == 2
    names = sorted(path.name for path in (tmp_path / "peer").iterdir())
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == names
    for name in ("last", "model_best", "checkpoint-0"):
        found, expected = read(tmp_path / "ours", name), read(tmp_path / "peer", name)
        assert [*found] == [*expected]
        assert_equal(found["state_dict"], expected["state_dict"])
        assert_equal(found["state_dict_ema"], expected["state_dict_ema"])
        with pytest.raises(AssertionError):
            assert_equal(found["state_dict_ema"], found["state_dict"])


def test_timm_loads_what_its_saver_wrote(tmp_path: Path) -> None:
    script = Script(tmp_path, ModelEmaV3, name=MODEL).train(1)
    path = str(tmp_path / "last.pth.tar")
    ema, online = script.ema.module.state_dict(), script.model.state_dict()
    assert_equal(load_state_dict(path, use_ema=True), ema)
    assert_equal(load_state_dict(path, use_ema=False), online)
    fresh = timm.create_model(MODEL, num_classes=4)
    assert str(load_checkpoint(fresh, path, use_ema=True)) == "<All keys matched successfully>"
    assert_equal(fresh.state_dict(), ema)
    load_checkpoint(fresh, path, use_ema=False)
    assert_equal(fresh.state_dict(), online)
    created = timm.create_model(MODEL, num_classes=4, checkpoint_path=path)
    assert_equal(created.state_dict(), ema)
    with pytest.raises(AssertionError):
        assert_equal(ema, online)
    plain = ModelEMA(create(torch.float32, MODEL))
    plain.load_weights(path)
    assert_equal(plain.ema_model.state_dict(), ema)


def stop_at(number: int) -> Callable[[int], None]:
    def stop(made: int) -> None:
        if made == number:
            raise CrashError

    return stop


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.integration)]
)
@pytest.mark.parametrize("how", HOW)
def test_a_crashed_training_resumes_bit_for_bit(
    how: dict[str, bool], dtype: torch.dtype, tmp_path: Path
) -> None:
    whole = Script(tmp_path / "whole", ModelEmaV3, dtype=dtype, **how).train(3)
    crashed = Script(tmp_path / "cut", ModelEmaV3, dtype=dtype, after_update=stop_at(5), **how)
    with pytest.raises(CrashError):
        crashed.train(3)
    last = str(tmp_path / "cut" / "last.pth.tar")
    resumed = Script(tmp_path / "cut", ModelEmaV3, resume=last, dtype=dtype, **how)
    assert resumed.start_epoch == 1
    resumed.train(3)
    assert resumed.metrics == whole.metrics[1:]
    found, expected = read(tmp_path / "cut"), read(tmp_path / "whole")
    assert_equal(found["state_dict"], expected["state_dict"])
    assert_equal(found["state_dict_ema"], expected["state_dict_ema"])
    with pytest.raises(AssertionError):
        assert_equal(found["state_dict_ema"], found["state_dict"])


def test_what_an_exact_ema_has_beside_bfloat16_weights_is_in_its_own_state() -> None:
    def train(ema: ModelEmaV3, model: nn.Module, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.add_(noise.bfloat16(), alpha=0.01)
            ema.update(model, step)

    model = nn.Linear(64, 64, dtype=torch.bfloat16)
    ema = ModelEmaV3(model, decay=0.99, precision="exact")
    train(ema, model, range(1, 20))
    own, weights = copy.deepcopy(ema.ema.state_dict()), copy.deepcopy(ema.state_dict())
    online = copy.deepcopy(model)
    train(ema, model, range(20, 60))
    for state, load in (
        (own, lambda one: one.ema.load_state_dict),
        (weights, lambda one: one.load_state_dict),
    ):
        twin = copy.deepcopy(online)
        resumed = ModelEmaV3(twin, decay=0.99, precision="exact")
        load(resumed)(state)
        train(resumed, twin, range(20, 60))
        equal = torch.equal(resumed.module.weight, ema.module.weight)
        assert equal == (state is own)
        # Half a spacing is lost at the resume; a spacing may lie between what is rounded then.
        largest = max(one.weight.abs().max().item() for one in (online, ema.module, model))
        bound = 1.5 * torch.finfo(torch.bfloat16).eps * largest
        torch.testing.assert_close(resumed.module.weight, ema.module.weight, rtol=0, atol=bound)


def test_an_exception_in_the_validation_leaves_both_models_alone(tmp_path: Path) -> None:
    def fails(model: nn.Module, dtype: torch.dtype) -> float:
        value = validate(model, dtype)
        if not failed:
            failed.append(value)
            raise CrashError
        return value

    failed: list[float] = []
    script = Script(tmp_path / "failed", ModelEmaV3, validate=fails)
    with pytest.raises(CrashError):
        script.train(1)
    script.start_epoch = 1
    script.train(2)
    whole = Script(tmp_path / "whole", ModelEmaV3).train(2)
    assert [*failed, *script.metrics] == whole.metrics
    assert_equal(script.model.state_dict(), whole.model.state_dict())
    assert_equal(script.ema.state_dict(), whole.ema.state_dict())


def test_validating_and_saving_change_nothing(tmp_path: Path) -> None:
    script = Script(tmp_path, ModelEmaV3)
    script.train_one_epoch(0)
    before = copy.deepcopy((script.model.state_dict(), script.ema.state_dict()))
    validate(script.ema, torch.float32)
    script.saver.save_recovery(0, batch_idx=1)
    assert_equal(script.model.state_dict(), before[0])
    assert_equal(script.ema.state_dict(), before[1])
    assert script.model.training
    found = read(tmp_path, "recovery-0-1")
    assert_equal(found["state_dict_ema"], script.ema.module.state_dict())


class Tiny(nn.Module):
    """What timm's tasks ask of a model."""

    def __init__(self, hidden: int = 5) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.num_features = 3, 3, hidden
        self.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
        self.stem = nn.Linear(3, hidden)
        self.head = nn.Linear(hidden, 3)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.stem(x.mean((2, 3)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The import that timm's tasks use is changed."""
    monkeypatch.setattr("timm.task.task.ModelEmaV3", ModelEmaV3)


def distillation() -> nn.Module:
    return timm.task.FeatureDistillationTask(
        Tiny(hidden=4), Tiny(hidden=6), criterion=nn.CrossEntropyLoss(), verbose=False
    )


def saved(task: nn.Module, folder: Path) -> Path:
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)
    saver = CheckpointSaver(
        task.get_trainable_module(), optimizer, checkpoint_dir=str(folder), task=task
    )
    saver.save_checkpoint(1)
    return folder / "last.pth.tar"


def test_distillation_saves_and_loads_the_projections_ema_too(
    tmp_path: Path, patched: None
) -> None:
    task = distillation()
    task.setup_ema(decay=0.5)
    x = torch.randn(2, 3, 8, 8)
    task(x, torch.tensor([0, 1]))["loss"].backward()
    with torch.no_grad():
        for parameter in task.get_trainable_module().parameters():
            parameter.add_(1.0)
    task.update_ema()
    path = saved(task, tmp_path)
    checkpoint = torch.load(path)
    assert [*checkpoint["state_dict_ema"]] == [*checkpoint["state_dict"]]
    projection = checkpoint["task_state"]["projection"]["weight"]
    torch.testing.assert_close(
        checkpoint["task_state_ema"]["projection"]["weight"], projection - 0.5
    )

    fresh = distillation()
    fresh.setup_ema(decay=0.5)
    resume_task_checkpoint(fresh, str(path), log_info=False)
    load_task_ema_checkpoint(fresh, str(path))
    before = fresh.get_eval_model(ema=True)(x)
    assert torch.equal(before, task.get_eval_model(ema=True)(x))
    for one in (task, fresh):
        one.update_ema(step=7)
        assert type(one.get_trainable_module(ema=True)) is ModelEmaV3
    names = (
        "trainable_module_ema.module.projection.weight",
        "trainable_module_ema.module.student.stem.weight",
    )
    for name in names:
        assert torch.equal(fresh.state_dict()[name], task.state_dict()[name]), name


def test_a_checkpoint_has_the_same_keys_by_task_and_by_ema(tmp_path: Path, patched: None) -> None:
    task = ClassificationTask(Tiny(), nn.CrossEntropyLoss(), verbose=False)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)
    task.setup_ema(decay=0.0)
    assert task.has_ema()
    checkpoint = torch.load(saved(task, tmp_path))
    assert "task_state_ema" not in checkpoint
    ema = task.get_trainable_module(ema=True)
    saver = CheckpointSaver(
        task.get_trainable_module(), optimizer, model_ema=ema, checkpoint_dir=str(tmp_path)
    )
    saver.save_checkpoint(2)
    assert_equal(
        torch.load(tmp_path / "last.pth.tar")["state_dict_ema"], checkpoint["state_dict_ema"]
    )


def test_a_compiled_ema_model_reflects_an_update(patched: None) -> None:
    task = ClassificationTask(Tiny(), nn.CrossEntropyLoss(), verbose=False)
    task.setup_ema(decay=0.0)
    task.compile(backend="eager")
    task.compile_ema(backend="eager")
    assert hasattr(task.get_eval_model(ema=True), "_orig_mod")
    x = torch.randn(2, 3, 8, 8)
    before = task.get_eval_model(ema=True)(x).detach().clone()
    with torch.no_grad():
        for parameter in task.get_trainable_module().parameters():
            parameter.add_(0.25)
    task.update_ema(step=2)
    after = task.get_eval_model(ema=True)(x)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, task.get_eval_model()(x))


def test_a_task_may_move_with_its_ema(patched: None) -> None:
    task = ClassificationTask(Tiny(), nn.CrossEntropyLoss(), verbose=False)
    task.setup_ema(decay=0.5)
    task.double().train()
    task.update_ema(step=5)
    ema = task.get_trainable_module(ema=True).module
    assert {parameter.dtype for parameter in ema.parameters()} == {torch.float64}


def on_rank(reduce: bool) -> list[dict[str, Tensor]]:
    """timm's script on several ranks, up to the distribution of BatchNorm's statistics."""
    results = []
    for ema_class in (ModelEmaV3, TimmEma):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("timm.task.task.ModelEmaV3", ema_class)
            task = ClassificationTask(
                create(torch.float32, ""), nn.CrossEntropyLoss(), verbose=False
            )
            ema = task.setup_ema(decay=0.8, use_warmup=True)
        task.prepare_distributed(broadcast_buffers=False)
        model = task.get_trainable_module()
        assert isinstance(model, nn.parallel.DistributedDataParallel)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        states = []
        number = 0
        for epoch in range(2):
            for x, y in batches(10 * dist.get_rank() + epoch, torch.float32)[:2]:
                task(x, y)["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
                number += 1
                task.update_ema(step=number)
            states.append(copy.deepcopy(ema.module.state_dict()))
            timm.utils.distribute_bn(model, dist.get_world_size(), reduce)
            timm.utils.distribute_bn(ema, dist.get_world_size(), reduce)
            states.append(copy.deepcopy(ema.module.state_dict()))
        results.append(states)
    return results


@pytest.mark.integration
@pytest.mark.distributed
@pytest.mark.parametrize("reduce", [False, True], ids=["broadcast", "reduce"])
def test_batch_norm_statistics_of_the_ema_are_distributed(reduce: bool) -> None:
    (ours, peer), (ours_on_1, _) = run(2, on_rank, reduce, timeout=120)
    for found, expected in zip(ours, peer, strict=True):
        assert_equal(found, expected)
    assert_equal(ours[1], ours_on_1[1])
    assert_equal(ours[3], ours_on_1[3])
    with pytest.raises(AssertionError):
        assert_equal(ours[2], ours_on_1[2])
