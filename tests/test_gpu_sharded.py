"""FSDP2 on one GPU, with NCCL and a world of one rank."""

from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.debug import CommDebugMode

from ema_triton import ModelEMA
from ema_triton.distributed.dtensor import local_part
from tests.test_gpu import no_synchronisation

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _process_group(tmp_path) -> Iterator[None]:
    dist.init_process_group(
        "nccl",
        init_method=f"file://{tmp_path / 'store'}",
        rank=0,
        world_size=1,
        timeout=timedelta(seconds=60),
        device_id=torch.device("cuda", 0),
    )
    yield
    dist.destroy_process_group()


def network(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(129, 257), nn.Tanh(), nn.Linear(257, 3)]
    return nn.Sequential(*layers).to("cuda", dtype)


def shard(model: nn.Sequential, **options) -> nn.Sequential:
    for module in (model[0], model[2]):
        fully_shard(module, **options)
    return fully_shard(model, **options)


def change(model: nn.Module, step: int) -> None:
    chance = torch.Generator("cuda").manual_seed(step)
    for parameter in model.parameters():
        part = local_part(parameter).data
        part.add_(torch.randn(part.shape, generator=chance, device="cuda").to(part.dtype))


def assert_same(state, expected) -> None:
    for part in ("weights", "residuals"):
        assert state[part].keys() == expected[part].keys()
        for name, value in expected[part].items():
            assert torch.equal(state[part][name], value.cpu()), name


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_are_averaged_in_the_kernel_without_a_collective(dtype) -> None:
    model, plain = shard(network(dtype)), network(dtype)
    ema, expected = ModelEMA(model), ModelEMA(plain)
    assert ema.backend == expected.backend == "triton"
    for step in range(3):
        change(model, step)
        change(plain, step)
        with CommDebugMode() as seen:
            ema.update(0.25)
        assert seen.get_total_counts() == 0
        expected.update(0.25)
    assert_same(ema.state_dict(full_state_dict=True), expected.state_dict())
    assert ema.distance().distance == pytest.approx(expected.distance().distance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_update_of_shards_does_not_wait(dtype) -> None:
    model = shard(network(dtype))
    ema = ModelEMA(model)
    ema.update(0.25)
    with no_synchronisation():
        ema.update(0.25)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_swapped_model_evaluates_the_ema(mixed) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if mixed else None)
    model = shard(network(torch.float32), mp_policy=policy)
    ema = ModelEMA(model)
    change(model, 0)
    ema.update(0.25)
    x = torch.randn(5, 129, device="cuda")
    truth = network(torch.float32).cpu().double()
    truth.load_state_dict(ema.state_dict(full_state_dict=True)["weights"])
    with torch.no_grad():
        before = model(x)
        with ema.swapped():
            found = model(x)
        assert torch.equal(model(x), before)
    # Sums of 129 and 257 rounded products, in bf16 or in TF32.
    expected = truth(x.cpu().double())
    torch.testing.assert_close(found.cpu().double(), expected, rtol=0.05, atol=0.05)
    assert (before - found).abs().max() > 0.2


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checkpoint_and_a_full_state_come_back(dtype, tmp_path) -> None:
    model = shard(network(dtype))
    ema, other = ModelEMA(model), ModelEMA(model)
    change(model, 0)
    ema.update(0.25)
    dcp.save({"ema": ema}, checkpoint_id=tmp_path)
    dcp.load({"ema": other}, checkpoint_id=tmp_path)
    state = ema.state_dict(full_state_dict=True)
    assert_same(other.state_dict(full_state_dict=True), state)
    third = ModelEMA(model)
    third.load_state_dict(state, full_state_dict=True)
    change(model, 1)
    for each in (ema, other, third):
        each.update(0.25)
    for each in (other, third):
        assert_same(each.state_dict(full_state_dict=True), ema.state_dict(full_state_dict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_twin_goes_through_the_kernel(dtype) -> None:
    model, twin = shard(network(dtype)), shard(network(dtype))
    ema, alone = ModelEMA(model, ema_model=twin), ModelEMA(model)
    assert ema.backend == "triton"
    for step in range(3):
        change(model, step)
        ema.update(0.25)
        alone.update(0.25)
    assert_same(ema.state_dict(full_state_dict=True), alone.state_dict(full_state_dict=True))


def test_that_an_update_follows_the_optimizer_on_its_stream() -> None:
    model = shard(network(torch.float32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=True)
    ema = ModelEMA(model)
    truth = {
        name: value.double()
        for name, value in ema.state_dict(full_state_dict=True)["weights"].items()
    }
    for _ in range(20):
        model(torch.randn(64, 129, device="cuda")).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(0.1)
        for name, parameter in model.named_parameters():
            truth[name].lerp_(parameter.full_tensor().cpu().double(), 0.1)
    for name, value in ema.state_dict(full_state_dict=True)["weights"].items():
        # At most one rounding per update.
        torch.testing.assert_close(value.double(), truth[name], rtol=20 * 2**-23, atol=20 * 2**-23)
