"""Buffers whose average means nothing: spectral norm's unit vectors, pruning's masks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import spectral_norm as old_spectral_norm

from ema_triton import ModelEMA

GAP, STEPS = 0.1, 300

# From each pass to the next, an error of the singular vectors shrinks by (1 - GAP)**2.
CONVERGED = (1 - GAP) ** (2 * STEPS) * 1e8

FORMS: dict[str, tuple[Callable[[nn.Module], nn.Module], str, list[str]]] = {
    "parametrization": (
        parametrizations.spectral_norm,
        "parametrizations.weight.original",
        ["parametrizations.weight.0._u", "parametrizations.weight.0._v"],
    ),
    "old": (old_spectral_norm, "weight_orig", ["weight_u", "weight_v"]),
}
MODES = ["copy", "update", "ema_train"]


def basis(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q.float()


class Turned:
    """A layer whose largest singular vectors change, while its weight hardly does."""

    def __init__(self, form: str) -> None:
        torch.manual_seed(0)
        normalize, self.weight_name, self.unit_vectors = FORMS[form]
        self.left, self.right = basis(5), basis(4)
        self.make = lambda: normalize(nn.Linear(4, 5, bias=False))
        self.model = self.make()
        self.set_values([1.0, 1 - GAP])

    def set_values(self, largest: list[float]) -> None:
        values = torch.tensor([*largest, 0.5, 0.1])
        with torch.no_grad():
            self.weight(self.model).copy_(self.left[:, :4] @ values.diag() @ self.right.T)
        self.iterate(self.model)

    def weight(self, model: nn.Module) -> Tensor:
        return model.get_parameter(self.weight_name)

    def iterate(self, model: nn.Module) -> None:
        model.train()
        with torch.no_grad():
            for _ in range(STEPS):
                model(torch.ones(1, 4))

    def assert_normalized(self, model: nn.Module, weight: Tensor) -> None:
        """What a model multiplies by has a largest singular value of 1.

        The unit vectors u, v are the online weight's, whose largest singular value is 1. The EMA's
        weight is away from it by E, so that neither its own largest value nor u'Wv is away from 1
        by more than the norm of E.
        """
        model.eval()
        with torch.no_grad():
            sigma = torch.linalg.matrix_norm(model(torch.eye(4)).T, 2)
            error = torch.linalg.matrix_norm(weight - self.weight(self.model), 2)
        bound = (1 + error) / (1 - error) - 1 + CONVERGED + 100 * torch.finfo(torch.float32).eps
        assert bound < 0.25
        assert abs(sigma - 1) <= bound


def averaged(ema: ModelEMA, turned: Turned) -> Tensor:
    return ema.state_dict()["weights"][turned.weight_name].clone()


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("handle_buffers", MODES)
@pytest.mark.parametrize("form", FORMS)
def test_the_ema_models_normalized_weight_has_spectral_norm_one(
    form: str, handle_buffers: str, given: bool
) -> None:
    turned = Turned(form)
    ema_model = turned.make() if given else None
    ema = ModelEMA(turned.model, handle_buffers=handle_buffers, ema_model=ema_model)
    ema.sync()
    turned.set_values([1 - GAP, 1.0])
    ema.update(0.5)
    if handle_buffers == "ema_train":  # the EMA model's vectors are its own
        turned.iterate(ema.ema_model)
    turned.assert_normalized(ema.ema_model, averaged(ema, turned))


@pytest.mark.parametrize("as_module", [False, True])
@pytest.mark.parametrize("handle_buffers", MODES)
@pytest.mark.parametrize("form", FORMS)
def test_in_a_swap_the_online_models_has_too(
    form: str, handle_buffers: str, as_module: bool
) -> None:
    if handle_buffers == "ema_train" and not as_module:
        return  # is refused
    turned = Turned(form)
    ema = ModelEMA(turned.model, handle_buffers=handle_buffers, as_module=as_module)
    turned.set_values([1 - GAP, 1.0])
    ema.update(0.5)
    if handle_buffers == "ema_train":
        turned.iterate(ema.ema_model)
    before = {name: value.clone() for name, value in turned.model.state_dict().items()}
    with ema.swapped() as model:
        model.eval()
        sigma = torch.linalg.matrix_norm(model(torch.eye(4)).T.detach(), 2)
    turned.model.eval()
    for name, value in turned.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    error = GAP  # twice, halved by the momentum
    assert abs(sigma - 1) <= (1 + error) / (1 - error) - 1 + CONVERGED


@pytest.mark.parametrize("form", FORMS)
def test_unit_vectors_are_copied_and_other_buffers_averaged(form: str) -> None:
    turned = Turned(form)
    model = nn.Sequential(turned.model, nn.BatchNorm1d(5))
    ema = ModelEMA(model, handle_buffers="update")
    turned.set_values([1 - GAP, 1.0])
    model[1].running_mean.fill_(1.0)
    ema.update(0.25)
    weights = ema.state_dict()["weights"]
    for name in turned.unit_vectors:
        assert torch.equal(weights[f"0.{name}"], turned.model.get_buffer(name)), name
    assert weights["1.running_mean"].eq(0.25).all()


def test_control_averaged_unit_vectors_do_not_normalize() -> None:
    """Names alone do not tell them: a buffer so called in another module is averaged."""
    turned = Turned("parametrization")
    old = [turned.model.get_buffer(name).clone() for name in turned.unit_vectors]
    turned.set_values([1 - GAP, 1.0])
    new = [turned.model.get_buffer(name) for name in turned.unit_vectors]
    u, v = (torch.lerp(*pair, 0.5) for pair in zip(old, new, strict=True))
    assert u @ turned.weight(turned.model) @ v < 0.6
    model = nn.Linear(1, 1)
    model.register_buffer("weight_u", torch.zeros(2))
    model.register_buffer("_u", torch.zeros(2))
    ema = ModelEMA(model, handle_buffers="update")
    model.weight_u.fill_(1.0)
    model._u.fill_(1.0)
    ema.update(0.5)
    assert ema.ema_model.weight_u.eq(0.5).all()
    assert ema.ema_model._u.eq(0.5).all()


def test_masks_of_pruning_are_copied() -> None:
    def pruned() -> nn.Module:
        return prune.l1_unstructured(nn.Linear(4, 5), "weight", amount=0.5)

    model = pruned()
    ema = ModelEMA(model, handle_buffers="update", ema_model=pruned())
    prune.random_unstructured(model, "weight", amount=0.5)  # prunes half of the rest
    ema.update(0.25)
    assert torch.equal(ema.ema_model.weight_mask, model.weight_mask)


def test_another_buffer_that_is_no_running_statistic_is_copied_by_exclude() -> None:
    model = nn.Linear(1, 1)
    model.register_buffer("direction", torch.tensor([1.0, 0.0]))
    ema = ModelEMA(model, handle_buffers="update", exclude="direction")
    model.direction = torch.tensor([0.0, 1.0])
    ema.update(0.5)
    assert torch.equal(ema.ema_model.direction, model.direction)
