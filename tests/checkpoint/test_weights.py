"""`save_weights` and `load_weights`: the EMA's weights as files, and what others saved."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ema_triton import ModelEMA
from tests.plain import assert_same

pytest.importorskip("safetensors")

from safetensors import safe_open
from safetensors.torch import load_file

TIMM = Path(__file__).parents[1] / "files" / "timm_checkpoint.pth.tar"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 3, bias=False)
        self.tied = self.last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


def trained(dtype: torch.dtype = torch.float32, updates: int = 3) -> ModelEMA:
    model = Net().to(dtype)
    ema = ModelEMA(model)
    for _ in range(updates):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
            model.norm.running_mean.add_(1)
            model.norm.num_batches_tracked.add_(1)
        ema.update(0.3)
    return ema


def shown(ema: ModelEMA) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in ema.ema_model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_go_through_a_file(tmp_path: Path, dtype: torch.dtype) -> None:
    ema, path = trained(dtype), tmp_path / "ema.safetensors"
    ema.save_weights(path)
    low = dtype != torch.float32
    fresh = ModelEMA(Net().to(dtype))
    if low:
        with pytest.warns(UserWarning, match=r"what was rounded off .* is not in a module's state"):
            fresh.load_weights(path)
    else:
        fresh.load_weights(str(path))
    assert_same(shown(fresh), shown(ema))
    assert fresh.update_index == 0


def test_the_file_is_for_others_too(tmp_path: Path) -> None:
    ema, path = trained(), tmp_path / "ema.safetensors"
    ema.save_weights(path)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["update_index"] == "3"
        assert file.metadata()["format"] == "pt"
        assert file.metadata()["tied.weight"] == "last.weight"
    weights = load_file(path)
    expected = shown(ema)
    del expected["tied.weight"]
    assert_same(weights, expected)


def test_weights_saved_inside_a_swap_are_the_emas(tmp_path: Path) -> None:
    ema, path = trained(), tmp_path / "ema.safetensors"
    expected = shown(ema)
    with ema.swapped():
        ema.save_weights(path)
        with pytest.raises(RuntimeError, match=r"load_weights\(\) while the models' weights are"):
            ema.load_weights(path)
    del expected["tied.weight"]
    assert_same(load_file(path), expected)
    assert not torch.equal(load_file(path)["first.weight"], ema.model.first.weight)


def test_a_saved_state_gives_its_digits_and_keeps_the_index(tmp_path: Path) -> None:
    ema, path = trained(torch.bfloat16), tmp_path / "state.pt"
    torch.save(ema.state_dict(), path)
    fresh = ModelEMA(Net().bfloat16())
    fresh.update_index = 7
    fresh.load_weights(path)
    assert fresh.update_index == 7
    residuals = ema.state_dict()["residuals"]
    assert len(residuals) == 6  # four parameters, one of them by two names... and buffers are not
    assert_same(fresh.state_dict()["residuals"], residuals)
    assert_same(shown(fresh), shown(ema))


@pytest.mark.parametrize("precision", ["exact", "stochastic", "nearest"])
@pytest.mark.parametrize("ema_dtype", [torch.float32, torch.bfloat16])
def test_another_librarys_average_is_loaded(ema_dtype: torch.dtype, precision: str) -> None:
    model = Net()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for _ in range(5):
        with torch.no_grad():
            model.first.weight.add_(1.001)
        averaged.update_parameters(model)
    ema = ModelEMA(Net(), ema_dtype=ema_dtype, precision=precision)
    with pytest.warns(UserWarning, match="torch's AveragedModel counts 5 updates: set update_ind"):
        ema.load_weights(averaged.state_dict())
    for name, value in shown(ema).items():
        theirs = averaged.module.state_dict()[name]
        # Exact weights show the nearest bf16 but for ties, as stochastic ones start from it.
        assert torch.equal(value, theirs.to(value.dtype)), name
    twin = ModelEMA(Net(), ema_model=averaged.module, ema_dtype=ema_dtype, precision=precision)
    for average in (ema, twin):
        average.model.load_state_dict(model.state_dict())
        average.update(0.25)
    assert_same(shown(ema), shown(twin))


def test_diffusers_list_has_no_buffers() -> None:
    diffusers = pytest.importorskip("diffusers.training_utils")
    model = Net()
    theirs = diffusers.EMAModel(model.parameters(), decay=0.5)
    for _ in range(3):
        with torch.no_grad():
            model.first.weight.add_(1)
        theirs.step(model.parameters())
    ema = ModelEMA(Net())
    before = shown(ema)
    with pytest.warns(UserWarning, match=r"EMAModel has no 'norm.running_mean'.*counts 3 updates"):
        ema.load_weights(theirs.state_dict())
    after = shown(ema)
    for parameter, shadow in zip(ema.ema_model.parameters(), theirs.shadow_params, strict=True):
        assert torch.equal(parameter, shadow)
    assert torch.equal(after["norm.running_var"], before["norm.running_var"])


def test_buffers_that_stay_as_they_are_keep_their_residuals() -> None:
    diffusers = pytest.importorskip("diffusers.training_utils")
    model = nn.BatchNorm1d(64).bfloat16()
    ema = ModelEMA(model, handle_buffers="update")
    for _ in range(3):
        model.running_mean.normal_()
        ema.update(0.3)
    before = ema.state_dict(clone=True)["residuals"]["running_mean"]
    assert before.count_nonzero()
    with pytest.warns(UserWarning, match="has no 'running_mean'.*stay as they are"):
        ema.load_weights(diffusers.EMAModel(model.parameters()).state_dict())
    assert torch.equal(ema.state_dict()["residuals"]["running_mean"], before)


def test_a_timm_checkpoint_is_loaded() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    state = torch.load(TIMM, weights_only=False)
    expected = state["state_dict_ema"]
    assert not torch.equal(expected["0.weight"], state["state_dict"]["0.weight"])
    ema = ModelEMA(model)
    ema.load_weights(TIMM)
    assert_same(shown(ema), dict(expected))


@pytest.mark.parametrize(
    "content", [b"", b"no weights", b"PK\3\4 neither", b"\x10" + bytes(7) + b"{}"]
)
def test_a_file_that_is_none_changes_nothing(tmp_path: Path, content: bytes) -> None:
    ema, path = trained(), tmp_path / "ema.safetensors"
    path.write_bytes(content)
    before = ema.state_dict(clone=True)
    with pytest.raises(ValueError, match=r"ema\.safetensors"):
        ema.load_weights(path)
    assert_same(ema.state_dict()["weights"], before["weights"])
    with pytest.raises(FileNotFoundError):
        ema.load_weights(tmp_path / "absent")


def test_weights_of_another_model_say_what_does_not_fit() -> None:
    ema = trained()
    before = shown(ema)
    weights = ema.ema_model.state_dict()
    del weights["tied.weight"]
    with pytest.raises(
        ValueError, match=r"'tied.weight' is missing, 'extra' is unexpected"
    ) as info:
        ema.load_weights({**weights, "extra": torch.ones(1), "first.bias": torch.ones(9)})
    assert "'first.bias' is (9,) in the state but (4,) here" in str(info.value)
    assert_same(shown(ema), before)
