"""Modules that cache in eval mode what they computed from their weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ema_triton import ModelEMA


@torch.no_grad()
def move(model: nn.Module, value: float = 1.0) -> None:
    for index, parameter in enumerate(model.parameters()):
        parameter.add_(torch.linspace(value, value + index, parameter.numel()).view_as(parameter))


def plain_twin(ema: ModelEMA, model: nn.Module) -> nn.Module:
    """A new model, with the EMA's weights."""
    model.load_state_dict({k: v.clone() for k, v in ema.state_dict()["weights"].items()})
    return model


class GatheredWhenUsed(nn.Module):
    """timm's attention of LeViT: the bias is gathered once per device, in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_biases = nn.Parameter(torch.zeros(3))
        self.register_buffer("bias_idxs", torch.tensor([0, 1, 2, 1]), persistent=False)
        self.bias_cache: dict[str, Tensor] = {}

    @torch.no_grad()
    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        if mode and self.bias_cache:
            self.bias_cache = {}
        return self

    def bias(self) -> Tensor:
        if self.training:
            return self.attention_biases[self.bias_idxs]
        key = str(self.bias_idxs.device)
        if key not in self.bias_cache:
            self.bias_cache[key] = self.attention_biases[self.bias_idxs]
        return self.bias_cache[key]

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.bias()


class GatheredByTrain(nn.Module):
    """The attention of LeViT as published: `train(False)` gathers, and eval mode needs that."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_biases = nn.Parameter(torch.zeros(3))
        self.register_buffer("bias_idxs", torch.tensor([0, 1, 2, 1]))

    @torch.no_grad()
    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        if mode and hasattr(self, "ab"):
            del self.ab
        else:
            self.ab = self.attention_biases[self.bias_idxs]
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + (self.attention_biases[self.bias_idxs] if self.training else self.ab)


class Fused(nn.Module):
    """As re-parametrized convolutions: one weight in eval mode, made of two."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.fused: tuple[Tensor, Tensor] | None = None

    def train(self, mode: bool = True) -> nn.Module:
        self.fused = None
        return super().train(mode)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            return self.one(inputs) + self.other(inputs)
        if self.fused is None:
            weight = (self.one.weight + self.other.weight).detach()
            self.fused = weight, (self.one.bias + self.other.bias).detach()
        return functional.linear(inputs, *self.fused)


class FrozenNorm(nn.Sequential):
    """As a detector's backbone: its norms stay in eval mode."""

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        return self


CACHING = [GatheredWhenUsed, GatheredByTrain, Fused]


def nested(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(kind(), nn.Dropout(0.5)), nn.Linear(4, 4))


@torch.no_grad()
def evaluated(model: nn.Module) -> Tensor:
    """The output of a model of the same weights that was never asked before."""
    fresh = copy.deepcopy(model)
    fresh.train()
    fresh.eval()
    return fresh(torch.ones(2, 4))


@torch.no_grad()
def shown(model: nn.Module) -> Tensor:
    """As the model is, caches too."""
    assert not model.training
    return model(torch.ones(2, 4))


def updated(ema: ModelEMA) -> None:
    move(ema.model)
    ema.update(0.5)


def synced(ema: ModelEMA) -> None:
    move(ema.model)
    ema.sync()


def state_loaded(ema: ModelEMA) -> None:
    other = copy.deepcopy(ema)
    updated(other)
    ema.load_state_dict(other.state_dict())


def weights_loaded(ema: ModelEMA) -> None:
    move(ema.model)
    ema.load_weights(ema.model.state_dict())


@pytest.mark.parametrize("change", [updated, synced, state_loaded, weights_loaded])
@pytest.mark.parametrize("kind", CACHING)
@pytest.mark.parametrize("root", [True, False])
def test_the_ema_model_drops_what_it_made_of_old_weights(
    root: bool, kind: type[nn.Module], change: Callable[[ModelEMA], None]
) -> None:
    ema = ModelEMA(kind() if root else nested(kind))
    for _ in range(2):
        before = shown(ema.ema_model)
        change(ema)
        assert not torch.equal(evaluated(ema.ema_model), before)
        assert torch.equal(shown(ema.ema_model), evaluated(ema.ema_model))


@pytest.mark.parametrize("as_module", [True, False])
@pytest.mark.parametrize("kind", CACHING)
@pytest.mark.parametrize("root", [True, False])
def test_a_swapped_model_drops_what_it_made_of_the_other_weights(
    root: bool, kind: type[nn.Module], as_module: bool
) -> None:
    model = kind() if root else nested(kind)
    ema = ModelEMA(model, as_module=as_module)
    model.eval()
    move(model)
    model.train()
    model.eval()
    online = shown(model)
    emas = evaluated(plain_twin(ema, copy.deepcopy(model)))
    assert not torch.equal(online, emas)
    for _ in range(2):
        with ema.swapped():
            assert torch.equal(shown(model), emas)
        assert torch.equal(shown(model), online)


@pytest.mark.parametrize("kind", CACHING)
def test_put_in_eval_mode_inside_a_swap_it_evaluates_its_own_weights_afterwards(
    kind: type[nn.Module],
) -> None:
    model = nested(kind)
    ema = ModelEMA(model)
    updated(ema)
    with ema.swapped():
        model.eval()
        emas = shown(model)
    assert not model.training  # what the body did stays
    assert torch.equal(shown(model), evaluated(model))
    assert not torch.equal(shown(model), emas)


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("kind", [*CACHING, FrozenNorm])
def test_every_submodules_mode_is_as_it_was(kind: type[nn.Module]) -> None:
    """Monte Carlo dropout in an evaluated model, frozen norms in a trained one."""
    model = nested(kind)
    if kind is FrozenNorm:
        model[0][0].extend([nn.Linear(4, 4), nn.BatchNorm1d(4)])
    ema = ModelEMA(model)
    ema.ema_model[0][1].train()
    model.train()
    model[1].eval()
    model[0][1].eval()
    online, emas = flags(model), flags(ema.ema_model)
    assert sum(online.values()) not in (0, len(online))
    for _ in range(2):
        updated(ema)
        assert (flags(model), flags(ema.ema_model)) == (online, emas)
        with ema.swapped():
            assert flags(model) == online
        assert (flags(model), flags(ema.ema_model)) == (online, emas)


@pytest.mark.parametrize("kind", CACHING)
def test_dropout_that_was_left_on_stays_on_and_the_cache_is_new(kind: type[nn.Module]) -> None:
    ema = ModelEMA(nested(kind))
    ema.ema_model[0][1].train()
    shown(ema.ema_model)
    updated(ema)
    assert ema.ema_model[0][1].training
    layer = ema.ema_model[0][0]
    assert torch.equal(shown(layer), evaluated(layer))


def test_models_that_make_no_caches_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ema = ModelEMA(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout()))
    monkeypatch.setattr(nn.Module, "train", pytest.fail)
    updated(ema)
    with ema.swapped():
        pass
