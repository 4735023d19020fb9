"""`copy_to`: the EMA's weights and buffers in another module, all of them or none."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_triton import ModelEMA


class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.wide = nn.Linear(width, 4, bias=False)
        self.tied = nn.Linear(width, 4, bias=False)
        self.tied.weight = self.wide.weight
        self.frozen = nn.Parameter(torch.randn(7), requires_grad=False)
        self.phase = nn.Parameter(torch.randn(2, dtype=torch.complex64))
        self.register_buffer("cache", torch.randn(3), persistent=False)


def cast(model: Net, dtype: torch.dtype) -> Net:
    """The real floating tensors; `Module.to` would cast the complex ones too."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


def trained(dtype: torch.dtype | None = None, **options: Any) -> ModelEMA:
    model = cast(Net(), dtype or torch.float32)
    if options.pop("given", False):
        options["ema_model"] = copy.deepcopy(model)
    ema = ModelEMA(model, **options)
    for _ in range(3):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_(1)
        ema.update(0.3)
    return ema


def contents(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name].to(one[name].dtype)) for name in one
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "as_module=False": {"as_module": False},
    "given ema_model": {"given": True},
    "update": {"handle_buffers": "update"},
    "ema_train": {"handle_buffers": "ema_train"},
    "excluded": {"exclude": "conv"},
    "stochastic": {"precision": "stochastic"},
    "ema_dtype": {"ema_dtype": torch.bfloat16},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_model_has_what_the_ema_shows(dtype: torch.dtype, options: str) -> None:
    ema = trained(dtype, **OPTIONS[options])
    before, shown = contents(ema.model), ema.state_dict(clone=True)
    target = Net()
    parameters = [*target.parameters()]
    addresses = [p.data_ptr() for p in parameters]
    cache = target.cache.clone()
    ema.copy_to(target)
    assert same(
        shown["weights"], {n: t.to(shown["weights"][n]) for n, t in contents(target).items()}
    )
    assert [*target.parameters()] == parameters
    assert [p.data_ptr() for p in parameters] == addresses
    assert {p.dtype for p in parameters} == {torch.float32, torch.complex64}
    assert (
        target.norm.num_batches_tracked.item()
        == ema.state_dict()["weights"]["norm.num_batches_tracked"].item()
    )
    assert torch.equal(target.cache, cache)  # non-persistent: each model's own
    assert target.tied.weight is target.wide.weight
    assert (target.frozen.requires_grad, target.conv.weight.requires_grad) == (False, True)
    # Neither the online model nor the EMA has changed.
    assert same(contents(ema.model), before)
    after = ema.state_dict()
    assert same(after["weights"], shown["weights"])
    assert same(after["residuals"], shown["residuals"])
    assert not same(contents(target), before)  # the control


@pytest.mark.parametrize("target_dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_targets_dtype_stays(target_dtype: torch.dtype) -> None:
    ema = trained()
    target = cast(Net(), target_dtype)
    ema.copy_to(target)
    assert target.conv.weight.dtype == target.norm.running_mean.dtype == target_dtype
    shown = ema.ema_model.conv.weight
    assert torch.equal(target.conv.weight, shown.to(target_dtype))
    assert target.norm.num_batches_tracked.dtype == torch.int64


@pytest.mark.parametrize("options", [o for o in OPTIONS if o != "ema_dtype"])
def test_training_may_go_on_from_the_ema(options: str) -> None:
    ema = trained(torch.bfloat16, **OPTIONS[options])
    optimizer = torch.optim.SGD(ema.model.parameters(), lr=0.0)
    averaged, index = ema.state_dict(clone=True)["weights"], ema.update_index
    ema.copy_to(ema.model)
    assert same(averaged, contents(ema.model))
    assert ema.update_index == index
    optimizer.step()
    ema.update(0.5)  # the two are the same now, but for what an exact EMA has beside its weights
    assert same(ema.state_dict()["weights"], averaged)
    assert same(contents(ema.model), averaged)


def test_copied_to_its_own_ema_model_nothing_changes() -> None:
    ema = trained(torch.bfloat16)
    before = ema.state_dict(clone=True)
    ema.copy_to(ema.ema_model)
    after = ema.state_dict()
    assert same(after["weights"], before["weights"])
    assert same(after["residuals"], before["residuals"])


def shared_with(model: nn.Module, names: list[str]) -> nn.Module:
    """A copy that has these modules of the model itself."""
    copied = copy.deepcopy(model)
    for name in names:
        setattr(copied, name, getattr(model, name))
    return copied


def test_what_the_ema_does_not_hold_comes_from_the_online_model() -> None:
    """As in `swapped()`, and as an EMA with a module copies it; buffers too."""
    model, left_out = Net(), ["conv", "norm"]
    with_module, without, sharing = (
        ModelEMA(model, exclude=left_out),
        ModelEMA(model, exclude=left_out, as_module=False),
        ModelEMA(model, exclude=left_out, ema_model=shared_with(model, left_out)),
    )
    for tensor in model.state_dict().values():
        tensor.add_(1)
    for ema in (with_module, without, sharing):
        ema.update(0.3)
    one, other, third = Net(), Net(), Net()
    with_module.copy_to(one)
    without.copy_to(other)
    sharing.copy_to(third)
    assert same(contents(one), contents(other))
    assert same(contents(one), contents(third))
    assert torch.equal(other.norm.running_mean, model.norm.running_mean)
    assert torch.equal(other.conv.weight, model.conv.weight)
    assert not torch.equal(other.wide.weight, model.wide.weight)  # the control
    versions = model.conv.weight._version, model.wide.weight._version
    without.copy_to(model)
    assert model.conv.weight._version == versions[0]
    assert model.wide.weight._version > versions[1]
    assert same(contents(model), contents(other))


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_inside(model: nn.Module) -> nn.Module:
    model.wide, model.conv = compiled(model.wide), compiled(model.conv)
    return model


@pytest.mark.parametrize("wrap", [compiled, compiled_inside])
def test_wrappers_of_the_target_are_taken_off(wrap: Callable[[nn.Module], nn.Module]) -> None:
    ema, target = trained(), Net()
    ema.copy_to(wrap(target))
    assert torch.equal(
        target.conv.get_parameter("weight" if wrap is not compiled_inside else "_orig_mod.weight"),
        ema.ema_model.conv.weight,
    )
    assert torch.equal(target.frozen, ema.ema_model.frozen)


def narrower(target: Net) -> nn.Module:
    return Net(width=5)


def renamed(target: Net) -> nn.Module:
    target.other = target.norm
    del target.norm
    return target


def of_integers(target: Net) -> nn.Module:
    target.frozen = nn.Parameter(torch.zeros(7, dtype=torch.int64), requires_grad=False)
    return target


def real(target: Net) -> nn.Module:
    target.phase = nn.Parameter(torch.zeros(2))
    return target


def expanded(target: Net) -> nn.Module:
    target.frozen = nn.Parameter(torch.zeros(1).expand(7), requires_grad=False)
    return target


def of_inference(target: Net) -> nn.Module:
    with torch.inference_mode():
        target.frozen = nn.Parameter(torch.zeros(7), requires_grad=False)
    return target


def on_meta(target: Net) -> nn.Module:
    target.frozen = nn.Parameter(torch.zeros(7, device="meta"), requires_grad=False)
    return target


def tying(target: Net) -> nn.Module:
    target.conv.bias = target.norm.weight
    return target


REFUSED: dict[Callable[[Net], Any], tuple[type, str]] = {
    narrower: (ValueError, r"'wide.weight' is \(4, 4\) in the state but \(4, 5\) here, 'tied.w"),
    renamed: (ValueError, "'other.weight' is not in the EMA, .*'norm.weight' is not in the mod"),
    of_integers: (ValueError, r"'frozen' is torch.float32 in the state but torch.int64 here"),
    real: (ValueError, r"'phase' is torch.complex64 in the state but torch.float32 here"),
    expanded: (ValueError, r"'frozen' cannot be written in place: several of its elements"),
    of_inference: (ValueError, r"'frozen' cannot be written in place: .* inference mode"),
    on_meta: (ValueError, "'frozen' has no memory"),
    tying: (ValueError, "'norm.weight' is tied to 'conv.bias', but has other values in the EMA"),
    lambda target: target.state_dict(): (ValueError, "an instance of nn.Module .* got OrderedDict"),
    lambda target: None: (ValueError, "an instance of nn.Module .* but got NoneType"),
}


@pytest.mark.parametrize("spoil", REFUSED)
def test_what_does_not_fit_is_an_error_and_nothing_is_copied(
    spoil: Callable[[Net], Any],
) -> None:
    ema = trained()
    error, text = REFUSED[spoil]
    target = spoil(Net())
    before = contents(target) if isinstance(target, nn.Module) else {}
    with pytest.raises(error, match=text) as caught:
        ema.copy_to(target)
    if before and spoil is not on_meta:
        assert same(contents(target), before)
    if " here" in text:
        assert "The EMA does not fit the model given to copy_to()" in str(caught.value)
        assert "Nothing was copied" in str(caught.value)
    ema.copy_to(Net())


def test_inside_a_swap_it_is_an_error() -> None:
    ema, target = trained(), Net()
    before = contents(target)
    other = ModelEMA(ema.model)
    for one in (ema, other):
        with one.swapped(), pytest.raises(RuntimeError, match=r"copy_to\(\) while .* swapped"):
            ema.copy_to(target)
    assert same(contents(target), before)
    ema.copy_to(target)


def test_autograd_sees_the_write() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    ema = ModelEMA(model)
    loss = model(torch.randn(3, 2)).sum()
    ema.copy_to(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    loss.backward()  # the control: another model was written
    loss = model(torch.randn(3, 2)).sum()
    ema.copy_to(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_was_computed_from_the_old_weights_is_dropped() -> None:
    """The autocast cache, and what modules cache in eval mode."""

    class Caching(nn.Linear):
        def train(self, mode: bool = True) -> Caching:
            super().train(mode)
            self.doubled = None if mode else 2 * self.weight.detach()
            return self

    model = Caching(2, 2, bias=False)
    ema = ModelEMA(model, as_module=False)
    target = Caching(2, 2, bias=False).eval()
    ema.copy_to(target)
    assert not target.training
    assert torch.equal(target.doubled, 2 * model.weight)
    x = torch.ones(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        before = target(x)
        target.weight.data.zero_()
        assert torch.equal(target(x), before)  # the control: it is cached
        ema.copy_to(target)
        assert torch.equal(target(x), model(x))


def test_sigint_waits_until_all_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    ema, target = trained(), Net()
    right, writes = Tensor.copy_, []

    def interrupted(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        writes.append(tensor)
        if len(writes) == 3:
            signal.raise_signal(signal.SIGINT)
        return right(tensor, *args, **options)

    monkeypatch.setattr(Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ema.copy_to(target)
    monkeypatch.undo()
    assert len(writes) > 3
    assert same(ema.state_dict()["weights"], contents(target))


@pytest.mark.parametrize("kind", ["ModelEMA", "EMAHandler"])
def test_the_online_model_cannot_be_assigned(kind: str) -> None:
    pytest.importorskip("ignite")
    import ema_triton

    model = nn.Linear(2, 2)
    ema = getattr(ema_triton, kind)(model)
    with pytest.raises(AttributeError) as caught:
        ema.model = nn.Linear(2, 2)
    assert str(caught.value) == (
        "The online model cannot be assigned: its tensors are paired with the EMA's. Load other "
        f"weights into it and call sync(), or build a new {'ModelEMA (or EMAHandler)'}."
    )
    assert ema.model is model
    assert ModelEMA(torch.compile(model, backend="eager")).model is model
    assert copy.deepcopy(ema).model is not model
