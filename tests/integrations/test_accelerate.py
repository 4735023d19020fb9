"""Trainings with accelerate, as its users write them; and the example and the page about it."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("accelerate")
pytest.importorskip("ignite")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader, TensorDataset

from ema_triton import CountWarmup, Delayed, EMAHandler, ModelEMA
from tests.integrations.scripts import EXAMPLES, ROOT, run, run_blocks, run_here, torchrun
from tests.oracle import Shadow
from tests.tolerances import update_bound

pytestmark = pytest.mark.usefixtures("one_thread")
SCHEDULE = Delayed(CountWarmup(0.9), 1)


@pytest.fixture(autouse=True)
def _accelerate_begins_anew() -> Iterator[None]:
    """Its state belongs to the process."""
    reset()
    yield
    reset()


def reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2, bias=False)
    ).to(dtype)


class Training:
    """A training as accelerate's documentation has it, with an EMA."""

    def __init__(
        self,
        *,
        accumulate: int = 1,
        dtype: torch.dtype = torch.float32,
        scaler: bool = False,
        register: bool = True,
        **options: Any,
    ) -> None:
        reset()
        self.accelerator = Accelerator(
            cpu=True,
            gradient_accumulation_steps=accumulate,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0),
            **options,
        )
        if scaler:  # accelerate itself makes one on a GPU only
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        model = network(dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        chance = torch.Generator().manual_seed(1)
        data = TensorDataset(torch.randn(60, 4, generator=chance).to(dtype))
        loader = DataLoader(data, batch_size=5, shuffle=True)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.9)
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            model, optimizer, loader, scheduler
        )
        self.ema = ModelEMA(self.model)
        self.ema.follow(self.optimizer, SCHEDULE)
        if register:
            self.accelerator.register_for_checkpointing(self.ema)
        self.steps = 0

    def epoch(
        self, number: int, after: Callable[[int], object] = lambda batch: None, overflow: Any = ()
    ) -> None:
        self.loader.set_epoch(number)
        for batch, (inputs,) in enumerate(self.loader):
            with self.accelerator.accumulate(self.model):
                noise = torch.randn_like(inputs)
                loss = self.model(inputs + noise).float().square().mean()
                self.accelerator.backward(loss)
                if batch in overflow:
                    next(self.model.parameters()).grad.fill_(float("inf"))
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            self.steps += self.accelerator.sync_gradients and not self.optimizer.step_was_skipped
            after(batch)


def contents(ema: ModelEMA) -> dict[str, Tensor]:
    state = ema.state_dict(clone=True)
    parts = {f"{part} {k}": v for part in ("weights", "residuals") for k, v in state[part].items()}
    assert state["update_index"] == ema.update_index
    return parts | {"update_index": torch.tensor(state["update_index"])}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize(
    ("options", "overflow"),
    [
        ({}, ()),
        ({"accumulate": 5}, ()),
        ({"accumulate": 2, "mixed_precision": "bf16"}, ()),
        ({"scaler": True}, (0, 3, 4, 11)),
        ({"scaler": True, "accumulate": 2}, (3, 8)),
    ],
    ids=["plain", "accumulating", "bf16 autocast", "overflows", "overflows, accumulating"],
)
def test_each_real_step_is_one_update_and_float64_agrees(
    options: dict[str, Any], overflow: tuple[int, ...]
) -> None:
    training = Training(**options)
    parameters = dict(training.ema.model.named_parameters())
    truth = Shadow(parameters)
    bound = {name: torch.zeros_like(value) for name, value in truth.values.items()}
    seen, buffers = 0, {}

    def follow(_: int) -> None:
        nonlocal seen
        assert training.ema.update_index == training.steps
        if training.steps == seen:
            return
        seen = training.steps
        buffers.update((name, one.clone()) for name, one in training.ema.model.named_buffers())
        for name, online in parameters.items():
            bound[name] += update_bound(truth.values[name], online.detach(), torch.float32)
        truth.update(parameters, SCHEDULE(seen))

    for number in range(2):
        training.epoch(number, follow, overflow)
    # Accelerate ends an accumulation at the end of an epoch.
    batches, accumulate = 12, options.get("accumulate", 1)
    skipped = len({batch // accumulate for batch in overflow})
    assert training.steps == 2 * (-(-batches // accumulate) - skipped)
    averaged = dict(training.ema.ema_model.named_parameters())
    for name, value in truth.values.items():
        assert ((averaged[name] - value).abs() <= bound[name]).all(), name
        assert ((parameters[name] - value).abs() > bound[name]).any()  # the control
    assert_equal(dict(training.ema.ema_model.named_buffers()), buffers)


@pytest.mark.parametrize(
    "options",
    [{"dtype": torch.bfloat16}, {"accumulate": 5, "mixed_precision": "bf16"}, {"scaler": True}],
    ids=["bf16 weights", "accumulating, bf16 autocast", "overflows"],
)
def test_a_crashed_and_resumed_training_is_the_uncut_one_bit_by_bit(
    options: dict[str, Any], tmp_path: Path
) -> None:
    overflow = (1, 7) if "scaler" in options else ()

    def train(training: Training, first: int, save_after: int | None = None) -> dict[str, Tensor]:
        for number in range(first, 4):
            training.epoch(number, overflow=overflow)
            if number == save_after:
                training.accelerator.save_state(str(tmp_path))
        online = {f"online {k}": v.clone() for k, v in training.ema.model.state_dict().items()}
        return contents(training.ema) | online

    torch.manual_seed(5)
    uncut = train(Training(**options), 0)

    def crash(batch: int) -> None:
        if batch == 7:
            raise RuntimeError("out of memory")

    torch.manual_seed(5)
    cut = Training(**options)
    cut.epoch(0, overflow=overflow)
    cut.epoch(1, overflow=overflow)
    cut.accelerator.save_state(str(tmp_path))
    with pytest.raises(RuntimeError, match="out of memory"):
        cut.epoch(2, crash)
    torch.manual_seed(6)
    resumed = Training(**options)
    torch.randn(3)  # another place in the random numbers
    resumed.accelerator.load_state(str(tmp_path))
    assert resumed.ema.update_index == uncut["update_index"] // 2
    assert_equal(train(resumed, 2), uncut)

    # The control: without the EMA in the checkpoint, of which accelerate complains.
    (tmp_path / "custom_checkpoint_0.pkl").unlink()
    forgetful = Training(**options, register=False)
    forgetful.accelerator.load_state(str(tmp_path))
    found = train(forgetful, 2)
    assert torch.equal(found["online 0.weight"], uncut["online 0.weight"])
    assert not torch.equal(found["weights 0.weight"], uncut["weights 0.weight"])


def test_an_ema_joins_a_training_whose_checkpoint_has_none(tmp_path: Path) -> None:
    old = Training(register=False)
    old.epoch(0)
    old.accelerator.save_state(str(tmp_path))
    with pytest.raises(RuntimeError, match="Number of custom checkpoints in folder"):
        Training().accelerator.load_state(str(tmp_path))
    resumed = Training(register=False)
    resumed.accelerator.load_state(str(tmp_path))
    ema = ModelEMA(resumed.model)
    resumed.accelerator.register_for_checkpointing(ema)
    assert_equal(dict(ema.ema_model.state_dict()), dict(old.ema.model.state_dict()))
    resumed.accelerator.save_state(str(tmp_path))
    Training().accelerator.load_state(str(tmp_path))


def test_an_exception_in_an_evaluation_leaves_the_online_weights() -> None:
    training, undisturbed = Training(), Training()
    torch.manual_seed(1)
    training.epoch(0)
    online = {k: v.clone() for k, v in training.ema.model.state_dict().items()}
    averaged = contents(training.ema)
    training.model.eval()
    predictions = []

    def evaluate() -> None:
        with training.ema.swapped():
            prediction = training.model(torch.ones(3, 4))
            predictions.append(training.accelerator.gather_for_metrics(prediction))
            raise RuntimeError("of the metric")

    with pytest.raises(RuntimeError, match="of the metric"):
        evaluate()
    assert torch.equal(predictions[0], training.ema.ema_model(torch.ones(3, 4)))
    training.model.train()
    assert_equal(dict(training.ema.model.state_dict()), online)
    assert_equal(contents(training.ema), averaged)
    training.epoch(1)
    torch.manual_seed(1)
    for number in range(2):
        undisturbed.epoch(number)
    assert_equal(contents(training.ema), contents(undisturbed.ema))


def test_what_a_mixed_precision_model_is_unwrapped_to_is_the_online_model(tmp_path: Path) -> None:
    training = Training(mixed_precision="bf16")
    training.epoch(0)
    ema = training.ema
    assert training.accelerator.unwrap_model(training.model) is ema.model
    training.accelerator.save_model(ema.ema_model, str(tmp_path))
    other = ModelEMA(network())
    other.load_weights(tmp_path / "model.safetensors")
    assert_equal(dict(other.ema_model.state_dict()), dict(ema.ema_model.state_dict()))
    assert ema.ema_model(torch.ones(3, 4)).dtype == torch.float32  # as accelerate's own forward


def test_a_handler_can_be_registered_too(tmp_path: Path) -> None:
    training = Training(register=False)
    handler = EMAHandler(training.model, momentum=0.3)
    training.accelerator.register_for_checkpointing(handler)
    training.epoch(0)
    handler.ema.update(0.3)
    training.accelerator.save_state(str(tmp_path))
    other = Training(register=False)
    twin = EMAHandler(other.model, momentum=0.3)
    other.accelerator.register_for_checkpointing(twin)
    other.accelerator.load_state(str(tmp_path))
    assert_equal(contents(twin.ema), contents(handler.ema))


# Made by each rank; accelerate has no FSDP2 on a CPU, and is told that it has.
SHARDED = """
import os, sys
import torch
import torch.distributed.checkpoint as dcp
from pathlib import Path
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from torch import nn
from ema_triton import Constant, ModelEMA

how, folder = sys.argv[1], Path(sys.argv[2])
accelerator = Accelerator(cpu=True)
state = accelerator.state
state.fsdp_plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2,
    auto_wrap_policy="no_wrap",
    cpu_ram_efficient_loading=False,
    state_dict_type="SHARDED_STATE_DICT",
)
PartialState._shared_state["distributed_type"] = state.distributed_type = DistributedType.FSDP
rank = accelerator.process_index


def training():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert "FSDP" in type(model).__name__
    ema = ModelEMA(model)
    ema.follow(optimizer, Constant(0.1))
    return model, optimizer, ema


def train(model, optimizer, steps):
    for step in steps:
        torch.manual_seed(100 * step + rank)
        accelerator.backward(model(torch.randn(3, 4)).square().mean())
        optimizer.step()
        optimizer.zero_grad()


model, optimizer, ema = training()
if how == "registered":
    accelerator.register_for_checkpointing(ema)
else:
    accelerator.register_save_state_pre_hook(
        lambda models, weights, folder: dcp.save({"ema": ema}, checkpoint_id=Path(folder) / "ema")
    )
    accelerator.register_load_state_pre_hook(
        lambda models, folder: dcp.load({"ema": ema}, checkpoint_id=Path(folder) / "ema")
    )
train(model, optimizer, range(3))
accelerator.save_state(folder)
accelerator.wait_for_everyone()
train(model, optimizer, range(3, 6))
uncut, online = ema.state_dict(full_state_dict=True), ema.distance()
train(model, optimizer, range(6, 8))  # lost in the crash
try:
    accelerator.load_state(folder)
except ValueError as error:
    assert how == "registered", error
    print(f"rank {rank}: {error}", flush=True)
if how == "hooks":
    assert ema.update_index == 3
    train(model, optimizer, range(3, 6))
    resumed = ema.state_dict(full_state_dict=True)
    if rank == 0:
        assert resumed["update_index"] == uncut["update_index"] == 6
        for name, value in uncut["weights"].items():
            assert torch.equal(resumed["weights"][name], value), name
    assert ema.distance() == online and online.distance > 0
    print(f"rank {rank}: bit-equal", flush=True)
torch.distributed.barrier()
os._exit(0)
"""


@pytest.mark.integration
@pytest.mark.distributed
def test_a_sharded_ema_resumes_by_two_hooks_and_registered_it_is_an_error(tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    said = torchrun(2, script, "hooks", tmp_path / "a", ends_with="rank 1: bit-equal")
    assert "rank 0: bit-equal" in said
    said = torchrun(2, script, "registered", tmp_path / "b", ends_with="rank 1: ")
    assert "rank 1: The state does not have this rank's part of '0.weight'" in said
    assert "Save ema.state_dict(full_state_dict=True)" in said
    assert "use torch.distributed.checkpoint" in said


def losses(printed: str) -> dict[int, tuple[float, float]]:
    """Of the online model and its EMA after each epoch, as the example prints them."""
    rows = re.findall(r"epoch +(\d+) .*online (\d\.\d+) +EMA (\d\.\d+)", printed)
    return {int(epoch): (float(online), float(ema)) for epoch, online, ema in rows}


def weights_in(folder: Path) -> dict[str, Tensor]:
    return pytest.importorskip("safetensors.torch").load_file(
        folder / "unet_ema" / "diffusion_pytorch_model.safetensors"
    )


def picture_in(folder: Path) -> bytes:
    return (folder / "digits.png").read_bytes()


def needs_the_example() -> None:
    for package in ("diffusers", "sklearn", "matplotlib"):
        pytest.importorskip(package)


def test_the_example_draws_saves_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs_the_example()
    quick = ("--images=512", "--sampling-steps=4")
    run_here(monkeypatch, "accelerate_ddpm.py", "--epochs=2", *quick, f"--output={tmp_path / 'a'}")
    found = losses(capsys.readouterr().out)
    assert [*found] == [1, 2]
    assert found[2][1] < found[1][1]
    assert found[2][0] != found[2][1]
    from diffusers import UNet2DModel

    loaded = UNet2DModel.from_pretrained(tmp_path / "a" / "unet_ema")
    assert_equal(dict(loaded.state_dict()), weights_in(tmp_path / "a"))
    assert picture_in(tmp_path / "a")[:4] == b"\x89PNG"
    reset()
    run_here(monkeypatch, "accelerate_ddpm.py", "--epochs=1", *quick, f"--output={tmp_path / 'b'}")
    assert not torch.equal(weights_in(tmp_path / "b")["conv_in.weight"], loaded.conv_in.weight)
    reset()
    capsys.readouterr()
    again = ("--resume", "--epochs=2", *quick, f"--output={tmp_path / 'b'}")
    run_here(monkeypatch, "accelerate_ddpm.py", *again)
    assert losses(capsys.readouterr().out) == {2: found[2]}
    assert_equal(weights_in(tmp_path / "b"), weights_in(tmp_path / "a"))
    assert picture_in(tmp_path / "b") == picture_in(tmp_path / "a")


@pytest.mark.integration
def test_the_example_killed_and_resumed_ends_bit_equal(tmp_path: Path) -> None:
    needs_the_example()
    options = ("--epochs=3", "--images=1280", "--sampling-steps=4")
    example = EXAMPLES / "accelerate_ddpm.py"
    run(example, *options, f"--output={tmp_path / 'a'}", ends_with="picture: ")
    command = [sys.executable, str(example), *options, f"--output={tmp_path / 'b'}"]
    cut = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "b" / "epoch-1").exists():
            assert time.monotonic() < deadline
            assert cut.poll() is None
            time.sleep(0.01)
    finally:
        cut.send_signal(signal.SIGKILL)
        cut.wait()
    assert not (tmp_path / "b" / "unet_ema").exists()
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", example)
    said = run(*launch, "--resume", *options, f"--output={tmp_path / 'b'}", ends_with="picture: ")
    assert re.search(r"resumed from .*epoch-[12]$", said, re.MULTILINE)
    assert_equal(weights_in(tmp_path / "b"), weights_in(tmp_path / "a"))


@pytest.mark.integration
@pytest.mark.distributed
def test_the_example_on_two_processes_resumes_bit_equal(tmp_path: Path) -> None:
    needs_the_example()
    example, quick = EXAMPLES / "accelerate_ddpm.py", ("--images=384", "--sampling-steps=4")
    folder = f"--output={tmp_path / 'a'}"
    uncut = torchrun(2, example, "--epochs=2", *quick, folder, ends_with="picture: ")
    assert [*losses(uncut)] == [1, 2]
    assert uncut.count("picture: ") == 1
    assert "2 processes" in uncut
    folder = f"--output={tmp_path / 'b'}"
    torchrun(2, example, "--epochs=1", *quick, folder, ends_with="picture: ")
    torchrun(2, example, "--resume", "--epochs=2", *quick, folder, ends_with="picture: ")
    assert_equal(weights_in(tmp_path / "b"), weights_in(tmp_path / "a"))


# Torch's of a checkpoint outside of a process group.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable:UserWarning")
def test_the_scripts_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_blocks("accelerate.md")
    assert names["ema"].update_index > 0
    assert "examples/accelerate_ddpm.py" in (ROOT / "docs" / "accelerate.md").read_text()
