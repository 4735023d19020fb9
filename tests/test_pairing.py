"""Pairing by name: what belongs together, what is tied, and what is refused."""

import copy

import pytest
import torch
from torch import nn

from ema_triton import ModelEMA
from ema_triton.modules import clean_name


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Embedding(5, 3)
        self.decoder = nn.Linear(3, 5, bias=False)
        self.decoder.weight = self.encoder.weight


def fill(model: nn.Module, value: float) -> None:
    for parameter in model.parameters():
        parameter.data.fill_(value)


def test_pairs_follow_names_not_positions() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    twin = nn.ModuleDict({"b": nn.Linear(2, 2), "a": nn.Linear(2, 2)})
    fill(model["a"], 1.0)
    fill(model["b"], 2.0)
    ModelEMA(model, ema_model=twin).update(1.0)
    assert twin["a"].weight.eq(1.0).all()
    assert twin["b"].weight.eq(2.0).all()


def test_tied_tensors_are_averaged_once() -> None:
    model = Tied()
    fill(model, 1.0)
    ema = ModelEMA(model)
    fill(ema.ema_model, 0.0)
    ema.update(0.25)
    assert ema.ema_model.decoder.weight is ema.ema_model.encoder.weight
    assert ema.ema_model.encoder.weight.eq(0.25).all()  # twice would be 0.4375


def test_untying_the_online_model_unties_the_ema() -> None:
    model = Tied()
    ema = ModelEMA(model)
    fill(ema.ema_model, 0.0)
    fill(model, 1.0)
    model.decoder.weight = nn.Parameter(torch.full((5, 3), 2.0))
    ema.update(0.5)
    assert ema.ema_model.encoder.weight.eq(0.5).all()
    assert ema.ema_model.decoder.weight.eq(1.0).all()
    assert isinstance(ema.ema_model.decoder.weight, nn.Parameter)


def test_tying_the_online_model_keeps_both_averages() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    ema = ModelEMA(model)
    fill(ema.ema_model[0], 0.0)
    fill(ema.ema_model[1], 4.0)
    model[1].weight = model[0].weight
    fill(model, 2.0)
    ema.update(0.5)
    assert ema.ema_model[0].weight.eq(1.0).all()
    assert ema.ema_model[1].weight.eq(3.0).all()


def test_a_shared_module_that_is_split_is_an_error() -> None:
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, shared)
    ema = ModelEMA(model)
    model[1] = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"'0.weight' and '1.weight' are different tensors"):
        ema.update(0.5)


def test_added_and_removed_parameters_are_errors_that_name_them() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential())
    ema = ModelEMA(model)
    model[1].append(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"online model has tensors that the EMA model lacks"):
        ema.update(0.5)
    with pytest.raises(ValueError, match=r"'1\.0\.weight', '1\.0\.bias'.*Build a new ModelEMA"):
        ema.update(0.5)
    del model[1][0]
    ema.update(0.5)
    model[0].bias = None
    with pytest.raises(ValueError, match=r"The EMA model has tensors that .* lacks: '0\.bias'"):
        ema.update(0.5)


def test_a_parameter_added_to_a_leaf_is_noticed() -> None:
    model = nn.Linear(2, 2)
    ema = ModelEMA(model)
    model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match="'scale'"):
        ema.update(0.5)


def test_long_lists_of_names_are_cut() -> None:
    with pytest.raises(ValueError, match=r"'4\.weight' and 3 more"):
        ModelEMA(
            nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in range(8)]),
            ema_model=nn.Sequential(),
        )


def test_an_error_leaves_both_models_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = ModelEMA(model, handle_buffers="update")
    before = copy.deepcopy(ema.ema_model.state_dict())
    model[1].weight.data = torch.ones(3)
    with pytest.raises(ValueError, match=r"'1.weight' is \(3,\) in the online model but \(2,\)"):
        ema.update(0.5)
    torch.testing.assert_close(ema.ema_model.state_dict(), before, rtol=0, atol=0)
    model[1].weight.data = torch.ones(2)
    ema.update(0.5)


def test_a_shape_that_changes_at_the_same_address_is_an_error() -> None:
    model = nn.Linear(4, 4)
    ema = ModelEMA(model)
    address = model.bias.data_ptr()
    model.bias.data = model.bias.data[:2]
    assert model.bias.data_ptr() == address
    with pytest.raises(ValueError, match=r"'bias' is \(2,\) in the online model but \(4,\)"):
        ema.update(0.5)


def test_an_averaged_buffer_that_changed_shape_is_an_error_that_names_it() -> None:
    model = nn.BatchNorm1d(3)
    ema = ModelEMA(model, handle_buffers="update")
    model.running_mean = torch.zeros(1)
    with pytest.raises(ValueError, match=r"'running_mean' is \(1,\) .* but \(3,\)"):
        ema.update(0.5)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: nn.LazyLinear(2), ValueError, "uninitialized.*Run one forward pass"),
        (lambda: nn.Linear(2, 2, device="meta"), ValueError, "no memory.*to_empty"),
        (lambda: with_parameter(torch.eye(3).to_sparse()), TypeError, "sparse_coo.*to_dense"),
        (
            lambda: with_parameter(torch.ones(2).to(torch.float8_e5m2)),
            TypeError,
            "torch.float8_e5m2.*cannot be averaged",
        ),
        (
            lambda: with_parameter(torch.ones(2, dtype=torch.complex64).conj()),
            ValueError,
            "resolve_conj",
        ),
    ],
)
def test_what_cannot_be_averaged_is_refused(make, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ModelEMA(make())


def with_parameter(tensor: torch.Tensor) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(tensor, requires_grad=tensor.dtype.is_floating_point)
    return module


def test_real_and_complex_do_not_mix() -> None:
    with pytest.raises(TypeError, match=r"torch.complex64 .* and torch.float32"):
        ModelEMA(
            with_parameter(torch.ones(2, dtype=torch.complex64)),
            ema_model=with_parameter(torch.ones(2)),
        )


def test_clean_name_strips_what_compile_adds() -> None:
    assert clean_name("_orig_mod.layers.0._orig_mod.weight") == "layers.0.weight"
    assert clean_name("my_orig_mod.weight") == "my_orig_mod.weight"


def test_a_module_shared_with_the_online_model_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    weight = model[0].weight
    with pytest.raises(
        ValueError, match=r"'0\.weight' belongs to a module that the EMA model shares"
    ):
        ModelEMA(model, ema_model=nn.Sequential(model[0], nn.Linear(2, 2)))
    assert model[0].weight is weight
    assert weight.requires_grad


def test_two_names_in_one_module_can_be_untied() -> None:
    model = nn.Module()
    model.query = nn.Parameter(torch.zeros(2))
    model.key = model.query
    ema = ModelEMA(model)
    model.key = nn.Parameter(torch.ones(2))
    ema.update(0.5)
    assert ema.ema_model.query.eq(0.0).all()
    assert ema.ema_model.key.eq(0.5).all()


def test_a_parameter_that_becomes_a_lazy_conjugate_is_refused() -> None:
    model = with_parameter(torch.ones(2, dtype=torch.complex64))
    ema = ModelEMA(model)
    model.weight.data = model.weight.data.conj()
    with pytest.raises(ValueError, match="resolve_conj"):
        ema.update(0.5)


def test_nested_compiled_modules_get_clean_names() -> None:
    inner = nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager"))
    model = nn.Sequential(torch.compile(inner, backend="eager"))
    assert [*ModelEMA(model).ema_model.state_dict()] == ["0.0.weight", "0.0.bias"]


def test_the_chunk_table_is_made_on_the_cpu_whatever_the_default_device() -> None:
    pytest.importorskip("triton")
    model = nn.Linear(2, 2)
    with torch.device("meta"):
        ModelEMA(model, backend="triton")
