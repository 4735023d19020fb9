"""The flat EMA side, the chunk table, and the launches of a plan."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from torch import nn

from ema_triton import ModelEMA, planner
from ema_triton.modules import slots_of
from ema_triton.ops.precision import join_residual
from ema_triton.plan import Launch, Plan, make_plan
from ema_triton.state import ALIGNMENT, CHUNK
from tests.plans import plan_of
from tests.strategies import parameters


def model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(7, 3), nn.Linear(3, 1))


def only_launch(ema: ModelEMA) -> Launch:
    (launch,) = ema._planner.plan.launches
    return launch


def test_every_ema_tensor_is_an_aligned_part_of_one_buffer() -> None:
    ema = ModelEMA(model(), handle_buffers="update")
    bucket = only_launch(ema).bucket
    tensors = [*ema.ema_model.parameters()]
    tensors += [b for b in ema.ema_model.buffers() if b.is_floating_point()]
    assert len(bucket.names) == len(tensors) == 10
    begin, end = bucket.flat.data_ptr(), bucket.flat.data_ptr() + bucket.flat.nbytes
    for tensor in tensors:
        assert begin <= tensor.data_ptr() <= end - tensor.nbytes
        assert tensor.data_ptr() % ALIGNMENT == 0
        assert tensor.untyped_storage().data_ptr() == tensor.data_ptr()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    ranges = sorted((t.data_ptr(), t.data_ptr() + 4 * t.numel()) for t in tensors)
    assert all(end <= start for (_, end), (start, _) in pairwise(ranges))


def test_ema_tensors_have_the_online_strides() -> None:
    online = model().to(memory_format=torch.channels_last)
    online[2].weight.data = online[2].weight.data.t().contiguous().t()
    ema = ModelEMA(online)
    for ours, theirs in zip(ema.ema_model.parameters(), online.parameters(), strict=True):
        assert ours.stride() == theirs.stride()


def test_the_online_tensors_stay_where_they_are() -> None:
    online = model()
    addresses = [p.data_ptr() for p in online.parameters()]
    ema = ModelEMA(online)
    ema.update(0.5)
    assert [p.data_ptr() for p in online.parameters()] == addresses


def test_chunks_cover_every_element_once() -> None:
    sizes = [1, 8, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 8, 0]
    online = nn.ParameterList([torch.zeros(size) for size in sizes])
    launch = only_launch(ModelEMA(online))
    seen = torch.zeros(len(launch.bucket.flat), dtype=torch.int)
    address_of = dict(zip(launch.offsets, [s.data_ptr() for s in launch.sources], strict=True))
    starts = sorted(address_of)
    for number, (address, offset, packed, counted) in enumerate(launch.chunk_table.tolist()):
        assert counted == number
        length = packed // 2
        assert 0 < length <= CHUNK
        seen[offset : offset + length] += 1
        start = max(s for s in starts if s <= offset)
        assert address == address_of[start] + 4 * (offset - start)
    assert seen.max() == 1
    assert seen.sum() == sum(sizes)


def test_the_aligned_flag_is_set_where_both_sides_allow_it_and_only_there() -> None:
    storage = torch.zeros(100)
    tensors = [storage[:16], storage[17:33], storage[36:51], torch.zeros(CHUNK + 4)]
    online = parameters(tensors)
    ema = nn.ParameterList([torch.zeros(t.shape) for t in tensors])
    (launch,) = plan_of(online, ema).launches
    flags = {
        (name, index): packed & 1
        for (name, index), packed in zip(
            [("2", 0), ("0", 0), ("1", 0), ("3", 0), ("3", 1)],
            launch.chunk_table[:, 2].tolist(),
            strict=True,
        )
    }
    assert launch.names == ["2", "0", "1", "3"]
    # 2: 15 elements; 1: a misaligned address; the second chunk of 3: 4 elements.
    assert flags == {("2", 0): 0, ("0", 0): 1, ("1", 0): 0, ("3", 0): 1, ("3", 1): 0}


def test_chunk_offsets_beyond_int32_do_not_wrap() -> None:
    # A bucket of 3 * 2^31 elements that no memory backs: only its table is made.
    size = 3 * 2**30
    tensor = torch.zeros(1).expand(size)
    bucket = dataclasses.replace(
        only_launch(ModelEMA(nn.Linear(1, 1))).bucket,
        names=["a", "b"],
        offsets=[0, size],
        views=[tensor] * 2,
    )
    launch = Launch(bucket, [0, 1], torch.float32, True, 1.0, [tensor] * 2, [tensor] * 2)
    _, offset, packed, number = launch.chunk_table[-1].tolist()
    assert offset == 2 * size - CHUNK
    assert number == 2 * size // CHUNK - 1
    assert packed == 2 * CHUNK + (tensor.data_ptr() % 16 == 0)


def test_tensors_with_gaps_get_a_launch_of_their_own() -> None:
    online = nn.ParameterList([torch.zeros(4), torch.zeros(4)])
    online[1].data = torch.arange(8.0)[::2]
    plan = ModelEMA(online)._planner.plan
    assert {tuple(one.names): one.dense for one in plan.launches} == {("0",): True, ("1",): False}


def test_ema_tensors_that_share_a_version_keep_their_digits() -> None:
    """load_state_dict(assign=True) of one tensor by two names makes such parameters."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).bfloat16()
    model[1].weight = model[0].weight
    ema, wide = ModelEMA(model), ModelEMA(model, ema_dtype=torch.float32)
    state = ema.ema_model.state_dict()
    ema.ema_model.load_state_dict({**state, "1.weight": state["0.weight"]}, assign=True)
    first, second = ema.ema_model.parameters()
    assert first is not second
    plans = set()
    for _ in range(20):
        model[0].weight.data.add_(torch.randn(4, 4))
        for average in (ema, wide):
            average.update(0.01)
        plans.add(ema._planner.plan)
    assert len(plans) == 1
    for name, residual in ema._state.residuals.items():
        value = join_residual(ema.state_dict()["weights"][name], residual)
        assert torch.equal(value, wide.ema_model[0].weight), name


def test_a_new_plan_waits_for_the_device_before_it_reads_the_ema_and_before_it_frees_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ema, steps = ModelEMA(model()), []

    def planned(*args: object, **kwargs: object) -> Plan:
        steps.append("plan")
        return make_plan(*args, **kwargs)

    monkeypatch.setattr(planner, "make_plan", planned)
    monkeypatch.setattr(torch.cuda, "synchronize", steps.append)
    ema._planner.make(slots_of(ema.model))
    assert steps == ["plan"]  # on a CPU there is nothing to wait for
    gpu = torch.device("cuda", 0)
    bucket = only_launch(ema).bucket
    buckets = [dataclasses.replace(bucket, kind=bucket.kind._replace(device=gpu))]
    right = ema._state.lay_out

    def laid_out(*args: object) -> object:
        steps.append("lay out")
        return right(*args)

    monkeypatch.setattr(ema._state, "lay_out", laid_out)
    ema._state.buckets = buckets
    steps.clear()
    ema._planner.make(slots_of(ema.model))
    assert steps == [gpu, "lay out", "plan", gpu]
