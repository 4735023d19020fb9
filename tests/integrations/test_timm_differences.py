"""What differs from timm's own EMA: each row of the table in docs/timm.md, and the errors."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations

from ema_triton.integrations.timm import ModelEmaV3
from tests.integrations import with_timm
from tests.integrations.walks import Net, Walk, single_process

timm = with_timm.require()
TimmEma = timm.utils.ModelEmaV3


DECAYS = {torch.bfloat16: 0.999, torch.float16: 0.9999}


class Far:
    """Weights of an EMA at 0.5 beside an online 1, whose updates are less than half a spacing."""

    STEPS = 400

    def __init__(self, dtype: torch.dtype) -> None:
        self.decay = DECAYS[dtype]
        self.truth = 1 - 0.5 * self.decay**self.STEPS
        self.spacing = torch.finfo(dtype).eps / 2  # from 0.5 to 1
        self.model = nn.Linear(64, 63, dtype=dtype)
        assert 0.5 * (1 - self.decay) < self.spacing / 2

    def after_training(self, ema: nn.Module) -> Tensor:
        for parameter in ema.parameters():
            parameter.data.fill_(0.5)
        for parameter in self.model.parameters():
            parameter.data.fill_(1.0)
        for step in range(2, self.STEPS + 2):
            ema.update(self.model, step)
        return torch.cat([p.detach().flatten() for p in ema.parameters()]).double()


@pytest.mark.parametrize("dtype", DECAYS)
def test_low_precision_is_rounded_by_chance_right_in_the_mean(dtype: torch.dtype) -> None:
    far = Far(dtype)
    found = far.after_training(ModelEmaV3(far.model, far.decay, stochastic_rounding_seed=3))
    # Of a step's rounding up by a spacing with probability p, the variance is below p spacing**2.
    deviation = (far.spacing * (far.truth - 0.5) / len(found)) ** 0.5
    assert abs(found.mean() - far.truth) < 5 * deviation
    assert found.unique().numel() > 1


@pytest.mark.parametrize("dtype", DECAYS)
def test_exact_low_precision_ends_in_the_rounded_truth(dtype: torch.dtype) -> None:
    far = Far(dtype)
    found = far.after_training(ModelEmaV3(far.model, far.decay, precision="exact"))
    # The rounding of what is shown, and one of fp32 at each update.
    assert (found - far.truth).abs().max() <= far.spacing / 2 + far.STEPS * 2.0**-24
    assert found.unique().numel() == 1


@pytest.mark.parametrize("dtype", DECAYS)
def test_rounding_to_nearest_stands_still_and_a_warning_says_so(dtype: torch.dtype) -> None:
    far = Far(dtype)
    with pytest.warns(UserWarning, match="it stands still") as caught:
        found = far.after_training(ModelEmaV3(far.model, far.decay, stochastic_rounding=False))
    assert len(caught) == 1
    assert found.unique().tolist() == [0.5]


def test_timms_float16_stands_still_in_silence() -> None:
    far = Far(torch.float16)
    assert far.after_training(TimmEma(far.model, far.decay)).unique().tolist() == [0.5]


def test_spectral_norms_unit_vectors_stay_unit_vectors() -> None:
    model = parametrizations.spectral_norm(nn.Linear(4, 4))
    ema, peer = ModelEmaV3(model, decay=0.5), TimmEma(model, decay=0.5)
    vector = model.parametrizations.weight[0]._u
    vector.copy_(vector.roll(1).neg())
    name = "module.parametrizations.weight.0._u"
    for one in (ema, peer):
        one.update(model)
    assert torch.equal(ema.state_dict()[name], vector)
    assert peer.state_dict()[name].norm() < 0.99


def test_complex_parameters_are_averaged() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    ema, peer = ModelEmaV3(model, decay=0.75), TimmEma(model, decay=0.75)
    model.weight.data.fill_(4 + 8j)
    for one in (ema, peer):
        one.update(model)
    assert ema.module.weight.tolist() == [1 + 2j] * 2
    assert peer.module.weight.tolist() == [4 + 8j] * 2


@pytest.mark.parametrize(("exclude_buffers", "ours", "of_timm"), [(True, 4.0, 4.0), (False, 1, 0)])
def test_buffers_that_are_not_persistent(
    exclude_buffers: bool, ours: float, of_timm: float
) -> None:
    model = nn.Linear(1, 1)
    model.register_buffer("cache", torch.zeros(1), persistent=False)
    options = {"decay": 0.75, "exclude_buffers": exclude_buffers}
    ema, peer = ModelEmaV3(model, **options), TimmEma(model, **options)
    model.cache.fill_(4.0)
    for one in (ema, peer):
        one.update(model)
    assert (ema.module.cache.item(), peer.module.cache.item()) == (ours, of_timm)


def test_the_ema_model_needs_no_gradients() -> None:
    model = nn.Linear(1, 1)
    assert not any(parameter.requires_grad for parameter in ModelEmaV3(model).parameters())
    assert all(parameter.requires_grad for parameter in TimmEma(model).parameters())


def test_tensors_are_paired_by_name_and_not_by_their_order() -> None:
    model, other = nn.Module(), nn.Module()
    for one, names in ((model, "ab"), (other, "ba")):
        for name in names:
            one.register_parameter(name, nn.Parameter(torch.full((1,), float(ord(name)))))
    ema, peer = ModelEmaV3(model, decay=0.5), TimmEma(model, decay=0.5)
    for one in (ema, peer):
        one.update(other)
    assert ema.module.a.item() == float(ord("a"))
    assert peer.module.a.item() == (ord("a") + ord("b")) / 2


def test_tied_weights_are_averaged_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    ema, peer = ModelEmaV3(model, decay=0.9), TimmEma(model, decay=0.9)
    for one in (ema, peer):
        one.module[0].weight.data.zero_()
    model[0].weight.data.fill_(1.0)
    ema.update(model)
    peer.update(model)
    assert ema.module[0].weight.data.unique().item() == pytest.approx(0.1)
    assert ema.module[1].weight is ema.module[0].weight
    assert peer.module[0].weight.data.unique().item() == pytest.approx(0.19)


def test_nonfinite_values_can_be_skipped() -> None:
    model = nn.Linear(2, 2)
    ema = ModelEmaV3(model, decay=0.5, nonfinite="skip")
    model.weight.data[0, 0] = float("nan")
    ema.update(model)
    assert ema.module.weight.isfinite().all()
    assert ema.ema.nonfinite_counts() == {"weight": 1, "bias": 0}


def test_one_factor_of_the_momentum_by_module() -> None:
    model = Net()
    ema = ModelEmaV3(model, decay=0.75, momentum_scale={"last": 0.0})
    before = ema.module.last.weight.clone()
    Walk()(model)
    ema.update(model)
    assert torch.equal(ema.module.last.weight, before)
    assert not torch.equal(ema.module.first.weight, model.first.weight)


@pytest.mark.parametrize(("device", "on"), [("cpu", "meta"), ("cuda", "cpu"), ("cuda:1", "cpu")])
def test_an_ema_on_another_device_than_the_models_is_an_error(device: str, on: str) -> None:
    model = nn.Linear(2, 2, device=on)
    with pytest.raises(NotImplementedError) as raised:
        ModelEmaV3(model, device=device)
    text = str(raised.value)
    assert f"device='{device}', but 'weight' is on {on}" in text
    assert "--model-ema-force-cpu" in text
    assert "timm.utils.ModelEmaV3" in text
    with pytest.raises(NotImplementedError, match=f"device='{device}'"):
        ModelEmaV3(model, device=torch.device(device))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"decay": 1.5}, "decay: 1.5"),
        ({"decay": -0.1}, "decay: -0.1"),
        ({"decay": float("nan")}, "decay: nan"),
        ({"min_decay": 2}, "min_decay: 2"),
        ({"warmup_gamma": 0}, "warmup_gamma: 0"),
        ({"warmup_gamma": -1.0}, "warmup_gamma: -1.0"),
        ({"warmup_power": 0.0}, "warmup_power: 0.0"),
        ({"dtype": torch.int8}, "ema_dtype"),
        ({"precision": "fine"}, "'fine'"),
        ({"stochastic_rounding_seed": -1}, "seed"),
    ],
)
def test_invalid_arguments_are_errors_at_once(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ModelEmaV3(nn.Linear(2, 2), **options)


def test_an_argument_that_is_no_number_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"decay: '0\.9'"):
        ModelEmaV3(nn.Linear(2, 2), decay="0.9")
    with pytest.raises(TypeError, match="momentum"):
        ModelEmaV3(nn.Linear(2, 2), momentum=0.1)


def test_a_sharded_model_is_an_error_that_names_what_to_use() -> None:
    with single_process():
        model = fully_shard(nn.Linear(2, 2), mesh=dist.init_device_mesh("cpu", (1,)))
        with pytest.raises(NotImplementedError, match=r"sharded.*ModelEMA.*full_state_dict=True"):
            ModelEmaV3(model)


def test_a_torchscript_model_is_an_error() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2), check_trace=False)
    with pytest.raises(NotImplementedError, match="TorchScript"):
        ModelEmaV3(model)
