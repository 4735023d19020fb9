"""What a sharded model's EMA refuses, with the same error on every rank."""

import copy
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial

from ema_triton import ModelEMA
from tests.ranks import run
from tests.sharded import Net, by_fsdp, change, of_bfloat16, wholes_of

pytestmark = pytest.mark.distributed


def _full(ema):
    """Its whole state, on every rank."""
    state = [ema.state_dict(full_state_dict=True)]
    dist.broadcast_object_list(state)
    return state[0]


def with_a_plain_twin():
    ModelEMA(by_fsdp(), ema_model=Net())


def with_a_twin_of_another_dtype():
    ModelEMA(by_fsdp(), ema_model=of_bfloat16(), ema_dtype=torch.float32)


def with_no_twin():
    return ModelEMA(by_fsdp()).ema_model


def of_sums():
    model = nn.Linear(2, 2)
    mesh = init_device_mesh("cpu", (2,))
    model.weight = nn.Parameter(DTensor.from_local(torch.zeros(2, 2), mesh, [Partial()]))
    ModelEMA(model)


def of_fsdp1():
    model = FullyShardedDataParallel(Net(), use_orig_params=True, device_id=torch.device("cpu"))
    ModelEMA(nn.Sequential(model))


def of_zero3():
    model = nn.Linear(2, 2)
    model.weight.ds_id = 0  # as DeepSpeed marks the parameters that it has partitioned
    ModelEMA(model)


def _message(error, build):
    with pytest.raises(error) as caught:
        build()
    return str(caught.value)


REFUSED = {
    with_a_plain_twin: (
        ValueError,
        "'scale' is sharded over 2 ranks (S(0)) in the online model but not sharded in the EMA "
        "model, so that a rank has other elements of the one than of the other. Build the EMA "
        "after the model is sharded, with an ema_model that is sharded likewise, or without: a "
        "sharded model needs none, see ModelEMA.swapped().",
    ),
    with_a_twin_of_another_dtype: (
        ValueError,
        "'scale' is torch.bfloat16 on cpu with strides (1,) in the sharded EMA model, where "
        "torch.float32 on cpu with the online tensor's strides (1,) is needed, and a sharded "
        "tensor stays as it is. Build the ema_model so before sharding it, or leave it out.",
    ),
    with_no_twin: (
        RuntimeError,
        "The model is sharded, so that its EMA is kept in parts, and there is no ema_model. "
        "Evaluate the online model with the EMA's weights (with ema.swapped() as model: ...), "
        "or give an ema_model that is sharded likewise.",
    ),
    of_sums: (
        ValueError,
        "'weight' is sharded over 2 ranks (P(sum)): its values are sums over the ranks, which have "
        "to be made before they are averaged. Call redistribute() on it first.",
    ),
    of_fsdp1: (
        NotImplementedError,
        "module '0' is sharded by FullyShardedDataParallel (FSDP1), whose parameters have their "
        "shapes during its forward only. Shard the model by torch.distributed.fsdp.fully_shard "
        "(FSDP2), where they always have them.",
    ),
    of_zero3: (
        NotImplementedError,
        "'weight' is partitioned by DeepSpeed's ZeRO-3, which keeps its values in places of its "
        "own. Train with ZeRO stage 1 or 2, whose parameters are whole, or shard the model by "
        "torch.distributed.fsdp.fully_shard (FSDP2).",
    ),
}


@pytest.mark.parametrize("build", REFUSED)
def test_what_cannot_be_is_a_clear_error(build) -> None:
    error, message = REFUSED[build]
    assert run(2, _message, error, build) == [message] * 2


def _loads_what_does_not_fit():
    ema = ModelEMA(by_fsdp())
    before = wholes_of(ema)
    state = {name: value for name, value in before.items() if name != "norm.bias"}
    state["first.weight"] = state["first.weight"][:4]
    mine = state if dist.get_rank() == 0 else None
    messages = [
        _message(ValueError, lambda: ema.load_state_dict(state)),
        _message(ValueError, lambda: ema.load_state_dict(mine, full_state_dict=True)),
    ]
    with pytest.raises(ValueError, match="an empty one"):
        ema.load_state_dict({}, full_state_dict=True)
    for name, value in wholes_of(ema).items():
        assert torch.equal(value, before[name])
    return messages


def test_what_does_not_fit_is_an_error_on_every_rank() -> None:
    expected = (
        "The state does not fit this EMA model: 'norm.bias' is missing, 'first.weight' is (4, 5) "
        "in the state but (7, 5) here. Nothing was loaded. Load it into the EMA of a model like "
        "the one it was saved from."
    )
    assert run(2, _loads_what_does_not_fit) == [[expected] * 2] * 2


def _loads_some():
    ema = ModelEMA(of_bfloat16())
    change(ema.model, 0)
    ema.update(0.25)
    before = _full(ema)
    state = copy.deepcopy(before)
    for part in ("weights", "residuals"):
        del state[part]["norm.bias"]
        state[part]["first.weight"].fill_(2)
        state[part] |= {name: torch.ones(1) for name in ("other", "another")}
    state["weights"]["another"] = "no tensor"
    text = (
        "The state was loaded; but it has no 'norm.bias', which stay as they are; its 'other', "
        "'another' are not in this EMA, and were left out."
    )
    # Nor is looked at what the other rank says.
    mine, strict = (state, False) if dist.get_rank() == 0 else (None, True)
    with pytest.warns(UserWarning, match=re.escape(text)):
        ema.load_state_dict(mine, full_state_dict=True, strict=strict)
    found = _full(ema)
    for part in ("weights", "residuals"):
        for name, value in found[part].items():
            assert torch.equal(value, (before if name == "norm.bias" else state)[part][name]), name
    # What each rank has of its own, and only of some.
    ema.update(0.5)
    mine = ema.state_dict(clone=True)
    expected = _full(ema)
    ema.update(0.5)
    kept = _full(ema)
    del mine["weights"]["first.weight"]
    with pytest.warns(UserWarning, match="has no 'first.weight'"):
        ema.load_state_dict(mine, strict=False)
    found = _full(ema)
    for part in ("weights", "residuals"):
        for name, value in found[part].items():
            source = kept if name == "first.weight" else expected
            assert torch.equal(value, source[part][name]), name


def test_what_a_state_lacks_stays_on_every_rank() -> None:
    run(2, _loads_some)
