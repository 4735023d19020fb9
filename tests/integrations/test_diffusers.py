"""Beside diffusers' own `EMAModel`, its pipelines, and the folders that both write and read."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("ignite")
pytest.importorskip("safetensors")

from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel

from ema_triton import CountWarmup, Delayed, EMAHandler, InverseDecay, ModelEMA
from ema_triton.schedules import Schedule
from tests.integrations.scripts import ROOT, run_blocks
from tests.oracle import Shadow
from tests.unets import make_unet

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Its own advice to its own `EMAModel.from_pretrained`.
    pytest.mark.filterwarnings("ignore:It is deprecated to pass a pretrained:FutureWarning"),
    # The name of this argument before diffusers 0.42.
    pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning"),
]

DEFAULT = Delayed(CountWarmup(0.9), 1)


class Training:
    """Of a diffusion model, as diffusers' scripts do it."""

    def __init__(self, unet: UNet2DModel) -> None:
        self.unet = unet
        trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.02)
        self.scheduler = DDPMScheduler(20)
        self.count = 0

    def step(self) -> None:
        chance = torch.Generator().manual_seed(self.count)
        images, noise = torch.randn(2, 4, 1, 8, 8, generator=chance)
        moments = torch.randint(20, (4,), generator=chance)
        noisy = self.scheduler.add_noise(images.tanh(), noise, moments)
        torch.nn.functional.mse_loss(self.unet(noisy, moments).sample, noise).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.count += 1


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def copies(unet: UNet2DModel) -> dict[str, Tensor]:
    assert not [*unet.buffers()]
    return {name: value.detach().clone() for name, value in unet.named_parameters()}


WARMUP = {"decay": 0.9, "use_ema_warmup": True, "power": 3 / 4}


@pytest.mark.parametrize(
    ("arguments", "schedule", "frozen"),
    [
        ({"decay": 0.9}, DEFAULT, "conv_in"),
        ({**WARMUP, "foreach": True}, InverseDecay(1, 3 / 4, 0, 0.9), ""),
        ({"decay": 0.9, "foreach": True}, DEFAULT, ""),
        (WARMUP, InverseDecay(1, 3 / 4, 0, 0.9), "down_blocks"),
    ],
)
def test_side_by_side_with_emamodel_and_float64(
    arguments: dict[str, Any], schedule: Schedule, frozen: str
) -> None:
    """Each of ours is 1 eps from float64, of the largest value so far, and each of the peer 4.

    The peer rounds the difference (half an eps of at most twice the largest), 1 - decay (as much of
    their product), the product and the result.
    """
    unet = make_unet()
    if frozen:
        unet.get_submodule(frozen).requires_grad_(False)
    training = Training(unet)
    parameters = dict(unet.named_parameters())
    peer = EMAModel(unet.parameters(), **arguments)
    ours = ModelEMA(unet)
    ours.follow(training.optimizer, schedule)
    truth = Shadow(parameters)
    largest = {name: value.abs() for name, value in truth.values.items()}
    updates = 12
    for index in range(1, updates + 1):
        training.step()
        peer.step(unet.parameters())
        truth.update(parameters, schedule(index))
        for name, value in parameters.items():
            largest[name] = torch.maximum(largest[name], value.detach().double().abs())
    shadows = dict(zip(parameters, peer.shadow_params, strict=True))
    eps = torch.finfo(torch.float32).eps
    for name, value in ours.ema_model.named_parameters():
        bound = updates * eps * largest[name]
        assert ((value - truth.values[name]).abs() <= bound).all(), name
        assert ((shadows[name] - truth.values[name]).abs() <= 4 * bound).all(), name
        assert ((value - shadows[name]).abs() <= 5 * bound).all(), name
        if parameters[name].requires_grad:  # the control
            assert ((parameters[name] - value).abs() > 5 * bound).any(), name
        else:
            assert torch.equal(value, parameters[name])


TABLE = {
    "EMAModel(p)": ({}, Delayed(CountWarmup(0.9999), 1)),
    "decay=0.99, update_after_step=100": (
        {"decay": 0.99, "update_after_step": 100},
        Delayed(CountWarmup(0.99), 101),
    ),
    "use_ema_warmup=True": ({"use_ema_warmup": True}, InverseDecay(max_decay=0.9999)),
    "use_ema_warmup=True, inv_gamma=1.0, power=3/4": (
        {"use_ema_warmup": True, "inv_gamma": 1.0, "power": 3 / 4},
        InverseDecay(gamma=1.0, power=3 / 4, max_decay=0.9999),
    ),
    "use_ema_warmup=True, update_after_step=100": (
        {"use_ema_warmup": True, "update_after_step": 100},
        Delayed(InverseDecay(max_decay=0.9999), 100),
    ),
}


@pytest.mark.parametrize("case", TABLE)
def test_the_pages_table_of_schedules_has_their_decays(case: str) -> None:
    arguments, schedule = TABLE[case]
    peer = EMAModel([], **arguments)
    for step in (*range(1, 300), 5_000, 100_000, 10_000_000):
        assert schedule(step) == pytest.approx(1 - peer.get_decay(step), rel=1e-9, abs=1e-15)
    rows = [row for row in page().splitlines() if row.startswith("| `") and "EMAModel(" in row]
    shown = {row.split("|")[1].strip(" `"): row.split("|")[2].strip(" `") for row in rows}
    assert len(shown) == len(TABLE)
    (found,) = (
        value
        for call, value in shown.items()
        if eval(call, {"EMAModel": lambda *_, **options: options, "p": []}) == arguments
    )
    assert eval(found, vars(__import__("ema_triton"))) == schedule


def page() -> str:
    return (ROOT / "docs" / "diffusers.md").read_text()


def trained(steps: int = 3) -> tuple[Training, ModelEMA]:
    training = Training(make_unet())
    ema = ModelEMA(training.unet)
    ema.follow(training.optimizer, DEFAULT)
    for _ in range(steps):
        training.step()
    return training, ema


def samples(unet: UNet2DModel) -> Tensor:
    pipeline = DDPMPipeline(unet=unet, scheduler=DDPMScheduler(20))
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(2, generator, num_inference_steps=3, output_type="np").images
    return torch.from_numpy(images)


def test_a_pipeline_with_the_ema_model_draws_what_its_weights_draw() -> None:
    training, ema = trained()
    online = samples(training.unet)
    expected = make_unet()
    expected.load_state_dict(ema.state_dict()["weights"])
    assert torch.equal(samples(ema.ema_model), samples(expected))
    with ema.swapped():
        assert torch.equal(samples(training.unet), samples(expected))
    assert torch.equal(samples(training.unet), online)
    assert not torch.equal(online, samples(expected))


@pytest.mark.parametrize("as_module", [True, False])
def test_an_exception_leaves_the_online_weights_where_store_and_restore_leave_the_ema(
    as_module: bool,
) -> None:
    training = Training(make_unet())
    unet = training.unet
    peer = EMAModel(unet.parameters(), decay=0.9)
    ema = ModelEMA(unet, as_module=as_module)
    ema.follow(training.optimizer, DEFAULT)
    for _ in range(3):
        training.step()
        peer.step(unet.parameters())
    before = copies(unet)
    evaluated: dict[str, Tensor] = {}

    def evaluate_ours() -> None:
        with ema.swapped():
            evaluated.update(copies(unet))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        evaluate_ours()
    assert_same(copies(unet), before)
    training.step()  # and training goes on
    after = copies(unet)
    unet.load_state_dict(before)

    def evaluate_theirs() -> None:
        peer.store(unet.parameters())
        peer.copy_to(unet.parameters())
        raise ZeroDivisionError
        peer.restore(unet.parameters())

    with pytest.raises(ZeroDivisionError):
        evaluate_theirs()
    for name, value in copies(unet).items():
        torch.testing.assert_close(value, evaluated[name])
    assert not torch.equal(unet.conv_in.weight, before["conv_in.weight"])
    assert not torch.equal(unet.conv_in.weight, after["conv_in.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_ema_model_saves_diffusers_loads_bit_by_bit(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    training = Training(make_unet().to(dtype))
    ema = ModelEMA(training.unet)
    for momentum in (0.5, 0.01):
        with torch.no_grad():
            for parameter in training.unet.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update(momentum)
    ema.ema_model.save_pretrained(tmp_path / "unet_ema")
    loaded = UNet2DModel.from_pretrained(tmp_path / "unet_ema", torch_dtype=dtype)
    assert_same(copies(loaded), copies(ema.ema_model))
    assert not torch.equal(loaded.conv_in.weight, training.unet.conv_in.weight)
    assert loaded.config.norm_num_groups == 4
    pipeline = DDPMPipeline(unet=ema.ema_model, scheduler=DDPMScheduler(20))
    pipeline.save_pretrained(tmp_path / "pipeline")
    again = DDPMPipeline.from_pretrained(tmp_path / "pipeline", torch_dtype=dtype).unet
    assert_same(copies(again), copies(ema.ema_model))
    # As their scripts resume an EMA.
    peer = EMAModel.from_pretrained(tmp_path / "unet_ema", UNet2DModel)
    for shadow, parameter in zip(peer.shadow_params, ema.ema_model.parameters(), strict=True):
        assert torch.equal(shadow.to(dtype), parameter)


def handler_of(unet: UNet2DModel) -> ModelEMA:
    return EMAHandler(unet).ema


@pytest.mark.parametrize("build", [ModelEMA, handler_of])
def test_an_ema_goes_on_from_the_folder_and_step_of_emamodel(build: Any, tmp_path: Path) -> None:
    unet = make_unet()
    training = Training(unet)
    peer = EMAModel(unet.parameters(), decay=0.9, model_cls=UNet2DModel, model_config=unet.config)
    for _ in range(4):
        training.step()
        peer.step(unet.parameters())
    peer.save_pretrained(tmp_path / "unet_ema")
    ours = build(unet)
    with pytest.warns(UserWarning, match=r"counts 4 updates: set update_index") as caught:
        ours.load_weights(tmp_path / "unet_ema")
    assert len(caught) == 1
    for parameter, shadow in zip(ours.ema_model.parameters(), peer.shadow_params, strict=True):
        assert torch.equal(parameter, shadow)
    ours.update_index = 4
    forgetful = build(unet)
    forgetful.load_state_dict(ours.ema_model.state_dict())
    ours.follow(training.optimizer, DEFAULT)
    forgetful.follow(training.optimizer, DEFAULT)
    for _ in range(3):
        training.step()
        peer.step(unet.parameters())
    eps = torch.finfo(torch.float32).eps
    for ema, shadow in zip(ours.ema_model.parameters(), peer.shadow_params, strict=True):
        largest = max(1.0, shadow.abs().max().item())  # no weight gets as large in seven steps
        assert ((ema - shadow).abs() <= 3 * 5 * eps * largest).all()
    control = forgetful.ema_model.conv_in.weight
    assert not torch.allclose(control, peer.shadow_params[0], rtol=1e-4)


def test_in_bfloat16_ours_moves_where_emamodel_stands_still() -> None:
    unet = make_unet().to(torch.bfloat16)
    peer, ours = EMAModel(unet.parameters(), decay=0.999), ModelEMA(unet)
    begin = copies(unet)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.copy_(1.1 * parameter)
    peer.optimization_step = 10**6  # long after the warm-up
    for _ in range(400):
        peer.step(unet.parameters())
        ours.update(1 - peer.cur_decay_value)
    for shadow, value in zip(peer.shadow_params, begin.values(), strict=True):
        assert torch.equal(shadow, value)
    expected = 0.1 * (1 - 0.999**400)
    moved = ours.ema_model.conv_in.weight / begin["conv_in.weight"] - 1
    assert moved.float().mean().item() == pytest.approx(expected, rel=0.05)


def test_lora_through_include_is_emamodel_of_the_trainable_parameters() -> None:
    peft = pytest.importorskip("peft")
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    ).requires_grad_(False)
    layers = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=layers))
    trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.05)
    peer = EMAModel(trained.values(), decay=0.9)
    ema = ModelEMA(unet, include="*lora_*", as_module=False)
    ema.follow(optimizer, DEFAULT)

    def predict() -> Tensor:
        chance = torch.Generator().manual_seed(0)
        images = torch.randn(2, 1, 8, 8, generator=chance)
        return unet(images, 3, torch.randn(2, 5, 8, generator=chance)).sample

    for _ in range(4):
        predict().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        peer.step(trained.values())
    weights = ema.state_dict()["weights"]
    assert weights.keys() == trained.keys()  # no base is held
    for value, shadow in zip(weights.values(), peer.shadow_params, strict=True):
        torch.testing.assert_close(value, shadow)
    with torch.no_grad():
        online = predict()
        with ema.swapped():
            averaged = predict()
        peer.copy_to(trained.values())
        torch.testing.assert_close(averaged, predict())
        assert not torch.allclose(averaged, online, rtol=1e-3)
    saved = peft.get_peft_model_state_dict(unet, state_dict=weights)
    assert saved.keys() == peft.get_peft_model_state_dict(unet).keys()
    assert "get_peft_model_state_dict(unet, state_dict=ema.state_dict()" in page()


def test_the_script_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState

    monkeypatch.chdir(tmp_path)
    try:
        names = run_blocks("diffusers.md")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    assert names["ema"].update_index > 0
    folders = {path.name for path in tmp_path.iterdir()}
    assert {"unet_ema", "checkpoint"} <= folders
    assert re.search(r"\(accelerate\.md\)", page())
