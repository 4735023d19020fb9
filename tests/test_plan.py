"""The flat EMA side, the chunk table, and the watch that notices what moved."""

import dataclasses
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import nn

from ema_triton import ModelEMA, model_ema
from ema_triton.buckets import ALIGNMENT, CHUNK, Bucket
from ema_triton.plan import Plan, make_plan


def model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(7, 3), nn.Linear(3, 1))


def only_bucket(ema: ModelEMA) -> Bucket:
    (bucket,) = ema._plan.buckets
    return bucket


def test_every_ema_tensor_is_an_aligned_view_of_one_buffer() -> None:
    ema = ModelEMA(model(), handle_buffers="update")
    bucket = only_bucket(ema)
    tensors = [*ema.ema_model.parameters()]
    tensors += [b for b in ema.ema_model.buffers() if b.is_floating_point()]
    assert len(bucket.names) == len(tensors) == 10
    storage = bucket.flat.untyped_storage().data_ptr()
    for tensor in tensors:
        assert tensor.untyped_storage().data_ptr() == storage
        assert tensor.data_ptr() % ALIGNMENT == 0
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
    bucket = only_bucket(ModelEMA(online))
    seen = torch.zeros(len(bucket.flat), dtype=torch.int)
    address_of = dict(zip(bucket.offsets, [s.data_ptr() for s in bucket.sources], strict=True))
    starts = sorted(address_of)
    for address, offset, packed in bucket.chunk_table.tolist():
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
    online = nn.ParameterList([torch.empty(0) for _ in tensors])
    for parameter, tensor in zip(online, tensors, strict=True):
        parameter.data = tensor
    ema = nn.ParameterList([torch.zeros(t.shape) for t in tensors])
    (bucket,) = make_plan(online, ema, "copy").buckets
    flags = {
        (name, index): packed & 1
        for (name, index), packed in zip(
            [("2", 0), ("0", 0), ("1", 0), ("3", 0), ("3", 1)],
            bucket.chunk_table[:, 2].tolist(),
            strict=True,
        )
    }
    assert bucket.names == ["2", "0", "1", "3"]
    # 2: 15 elements; 1: a misaligned address; the second chunk of 3: 4 elements.
    assert flags == {("2", 0): 0, ("0", 0): 1, ("1", 0): 0, ("3", 0): 1, ("3", 1): 0}


def test_chunk_offsets_beyond_int32_do_not_wrap() -> None:
    # A bucket of 3 * 2^31 elements that no memory backs: only its table is made.
    size = 3 * 2**30
    tensor = torch.zeros(1).expand(size)
    key = only_bucket(ModelEMA(nn.Linear(1, 1))).key
    bucket = Bucket(
        key, ["a", "b"], tensor, None, None, None, [0, size], [tensor] * 2, [tensor] * 2
    )
    _, offset, packed = bucket.chunk_table[-1].tolist()
    assert offset == 2 * size - CHUNK
    assert packed == 2 * CHUNK + (tensor.data_ptr() % 16 == 0)


def replace(m: nn.Sequential) -> None:
    m[2].weight = nn.Parameter(torch.full((3, 7), 3.0))


def set_data(m: nn.Sequential) -> None:
    m[2].weight.data = torch.full((3, 7), 3.0)


def transpose_in_place(m: nn.Sequential) -> None:
    square = torch.arange(9.0).reshape(3, 3)
    m[3].weight.data = square.t()


def cast(m: nn.Sequential) -> None:
    m.double()


def to_channels_last(m: nn.Sequential) -> None:
    m.to(memory_format=torch.channels_last)


def replace_module(m: nn.Sequential) -> None:
    m[2] = nn.Linear(7, 3)


def assign(m: nn.Sequential) -> None:
    m.load_state_dict({k: v.clone() + 1 for k, v in m.state_dict().items()}, assign=True)


CHANGES: list[Callable[[nn.Sequential], None]] = [
    replace,
    set_data,
    cast,
    to_channels_last,
    replace_module,
    assign,
]


@pytest.mark.parametrize("side", ["online", "ema"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_moves_is_noticed_and_followed(
    change: Callable[[nn.Sequential], None], side: str
) -> None:
    online = model()
    ema = ModelEMA(online)
    assert not ema._plan.watch.is_stale()
    change(online if side == "online" else ema.ema_model)
    assert ema._plan.watch.is_stale()
    before = [p.double() for p in ema.ema_model.parameters()]
    dtypes = [p.dtype for p in ema.ema_model.parameters()]
    ema.update(0.25)
    assert not ema._plan.watch.is_stale()
    for old, ours, theirs, dtype in zip(
        before, ema.ema_model.parameters(), online.parameters(), dtypes, strict=True
    ):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), torch.lerp(old, theirs.double(), 0.25))


def test_a_transposed_view_at_the_same_address_is_followed() -> None:
    online = nn.Linear(3, 3, bias=False)
    ema = ModelEMA(online)
    address = online.weight.data_ptr()
    online.weight.data = online.weight.data.t()
    assert online.weight.data_ptr() == address
    ema.update(1.0)
    assert torch.equal(ema.ema_model.weight, online.weight)


def test_in_place_writes_are_not_moves() -> None:
    online = model()
    ema = ModelEMA(online)
    plan = ema._plan
    for m in (online, ema.ema_model):
        m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()})
    ema.update(0.5)
    assert ema._plan is plan


def test_a_stale_plan_keeps_the_buffers_that_are_still_in_place() -> None:
    online = model()
    ema = ModelEMA(online)
    flat = only_bucket(ema).flat
    replace(online)
    ema.update(0.5)
    assert only_bucket(ema).flat is flat


def test_freed_addresses_cannot_be_mistaken() -> None:
    """Memory freed by a cast is handed out again at once; the plan keeps its own alive."""
    online = nn.Linear(4, 4, bias=False)
    ema = ModelEMA(online)
    for dtype in (torch.half, torch.bfloat16, torch.float):
        online.to(dtype)
        online.weight.data = online.weight.data.clone()
    online.weight.data = online.weight.data.t().contiguous().t()
    ema.update(1.0)
    assert torch.equal(ema.ema_model.weight, online.weight)


def test_tensors_with_gaps_get_a_bucket_of_their_own() -> None:
    online = nn.ParameterList([torch.zeros(4), torch.zeros(4)])
    online[1].data = torch.arange(8.0)[::2]
    plan = ModelEMA(online)._plan
    assert {tuple(b.names): b.key.dense for b in plan.buckets} == {("0",): True, ("1",): False}


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
        plans.add(ema._plan)
    assert len(plans) == 1
    for name, value in ema._plan.memory().values.items():
        assert torch.equal(value, wide.ema_model[0].weight), name


def test_a_new_plan_waits_for_the_device_before_it_reads_the_ema_and_before_it_frees_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ema, steps = ModelEMA(model()), []

    def planned(*args: object, **kwargs: object) -> Plan:
        steps.append("plan")
        return make_plan(*args, **kwargs)

    monkeypatch.setattr(model_ema, "make_plan", planned)
    monkeypatch.setattr(torch.cuda, "synchronize", steps.append)
    ema._make_plan()
    assert steps == ["plan"]  # on a CPU there is nothing to wait for
    gpu = torch.device("cuda", 0)
    bucket = only_bucket(ema)
    bucket = dataclasses.replace(bucket, key=bucket.key._replace(device=gpu))
    ema._plan = dataclasses.replace(ema._plan, buckets=[bucket])
    steps.clear()
    ema._make_plan()
    assert steps == [gpu, "plan", gpu]
