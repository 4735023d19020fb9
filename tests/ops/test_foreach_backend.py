"""The foreach path: one call for one dtype, a bounded scratch for two."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ema_triton.ops import foreach_backend
from tests.plans import plan_of, run
from tests.tolerances import assert_update, update_bound


class Recorder(TorchDispatchMode):
    """Counts operators and remembers the largest allocation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append(func.overloadpacket.__name__)
        known = {t.untyped_storage().data_ptr() for t in tensors(args) + tensors(kwargs)}
        for tensor in tensors(result):
            if tensor.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


def tensors(tree: object) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def filled(sizes: list[int], value: float, dtype: torch.dtype) -> nn.ParameterList:
    return nn.ParameterList([torch.full((size,), value, dtype=dtype) for size in sizes])


SIZES = [3, 64, 64, 64, 64, 64, 64, 64, 64, 64, 100, 100, 5000, 70000]


def test_one_dtype_is_one_foreach_call_and_no_allocation() -> None:
    plan = plan_of(filled(SIZES, 1.0, torch.float32), ema := filled(SIZES, 0.0, torch.float32))
    run(foreach_backend, plan, 0.0)
    with Recorder() as recorder:
        run(foreach_backend, plan, 0.25)
    assert recorder.calls.count("_foreach_lerp_") == 1
    assert set(recorder.calls) == {"_foreach_lerp_", "cat"}  # cat gathers the small ones
    assert recorder.largest == 0
    assert all(p.eq(0.25).all() for p in ema)


@pytest.mark.parametrize("ema_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_mixed_dtypes_meet_in_a_bounded_scratch(ema_dtype: torch.dtype) -> None:
    online_dtype = torch.bfloat16 if ema_dtype != torch.bfloat16 else torch.float32
    sizes = [3, 2 * foreach_backend.SCRATCH + 5, 7, foreach_backend.SCRATCH - 1]
    plan = plan_of(filled(sizes, 1.0, online_dtype), ema := filled(sizes, 0.0, ema_dtype))
    with Recorder() as first:
        run(foreach_backend, plan, 0.25)
    with Recorder() as second:
        run(foreach_backend, plan, 1.0)
    assert 0 < first.largest <= 16 * 2**20  # laid once
    assert second.largest == 0
    assert all(p.eq(1.0).all() for p in ema)


def test_the_recorder_sees_a_full_size_temporary() -> None:
    with Recorder() as recorder:
        torch.zeros(1000).bfloat16().float()
    assert recorder.largest == 4000


def test_gaps_and_mixed_dtypes_together_stay_bounded() -> None:
    length = 3 * foreach_backend.SCRATCH
    online = nn.ParameterList([torch.empty(0, dtype=torch.bfloat16)])
    online[0].data = torch.randn(length, 2, dtype=torch.bfloat16)[:, :1]
    ema = nn.ParameterList([torch.randn(length, 1)])
    before = ema[0].detach().clone()
    plan = plan_of(online, ema)
    assert not plan.launches[0].dense
    with Recorder() as recorder:
        run(foreach_backend, plan, 0.3)
    assert recorder.largest <= 16 * 2**20
    truth = torch.lerp(before.double(), online[0].double(), torch.tensor(0.3).double())
    assert_update(ema[0].detach(), truth, update_bound(before, online[0], torch.float32))


def test_gathered_and_separate_tensors_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [1, 2, 3, 5, 64, 2047, 2048, 2049] * 20
    online = nn.ParameterList([torch.randn(size) for size in sizes])
    results = []
    for small, gathered in ((2048, 140), (0, 0)):
        monkeypatch.setattr(foreach_backend, "SMALL", small)
        ema = nn.ParameterList([torch.zeros(size) for size in sizes])
        plan = plan_of(online, ema)
        run(foreach_backend, plan, 0.3)
        gathers = foreach_backend._direct[plan.launches[0]].gathers
        assert (
            sum(
                any(part is s for s in plan.launches[0].sources)
                for parts, _ in gathers
                for part in parts
            )
            == gathered
        )
        assert all(len(whole) < foreach_backend.RUN for _, whole in gathers)
        results.append(torch.cat([*ema]))
    torch.testing.assert_close(*results, rtol=torch.finfo(torch.float32).eps, atol=0)


def test_scratch_goes_with_the_plan() -> None:
    before = len(foreach_backend._steps)
    plan = plan_of(filled([9], 1.0, torch.bfloat16), filled([9], 0.0, torch.float32))
    run(foreach_backend, plan, 0.5)
    assert len(foreach_backend._steps) == before + 1
    del plan
    assert len(foreach_backend._steps) == before
