"""Controls of the other tests: what is wrong with a launch, or with its code, is noticed."""

import re
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("numpy", "2.0")
pytest.importorskip("triton")

from ema_triton.ops import foreach_backend, triton_backend
from tests.plans import run
from tests.ptx.opcodes import ProgramError
from tests.ptx.run import compiled_for
from tests.ptx.test_launches import assert_same, emas, layout

FP32 = (torch.float32, torch.float32, "nearest")
EXACT = (torch.bfloat16, torch.bfloat16, "exact")
MIXED = (torch.float16, torch.float32, "nearest")


@pytest.mark.parametrize("case", [FP32, EXACT, MIXED], ids=str)
def test_a_chunk_that_is_too_long(case: tuple) -> None:
    ema, _ = emas(case, False, [layout(64), layout(16)])
    (one,) = ema._planner.plan.launches
    one.chunk_table[-1, 2] += 2 * 8
    with (
        compiled_for(90),
        pytest.raises(ProgramError, match=r"after '.* 0', in: @%p\d+ (ld|st)\.global"),
    ):
        run(triton_backend, ema._planner.plan, 0.5)


def test_a_chunk_that_is_too_long_in_a_swap() -> None:
    ema, _ = emas(FP32, False, [layout(64), layout(16)])
    (one,) = ema._planner.plan.launches
    one.chunk_table[-1, 2] += 2 * 8
    with (
        compiled_for(90),
        pytest.raises(ProgramError, match=r"after '.* 0', in: @%p\d+ ld\.global"),
    ):
        triton_backend.exchange(one)


@pytest.mark.parametrize("case", [FP32, EXACT, MIXED], ids=str)
def test_a_misaligned_address_that_is_called_aligned(case: tuple) -> None:
    ema, _ = emas(case, False, [layout(64, offset=1)])
    (one,) = ema._planner.plan.launches
    one.chunk_table[:, 2] |= 1
    with compiled_for(90), pytest.raises(ProgramError, match="past a multiple of it, in: @%p"):
        run(triton_backend, ema._planner.plan, 0.5)


def ptx_of(case: tuple, arch: int) -> str:
    """The code that an update with a float is."""
    seen = []

    def note(ptx: str) -> str:
        seen.append(ptx)
        return ptx

    with compiled_for(arch, note):
        run(triton_backend, emas(case, False, [layout(8)])[0]._planner.plan, 0.3)
    return seen[0]


def changed(ptx: str, pattern: str, replacement: str) -> Iterator[str]:
    """The code with one instruction changed, for each that matches."""
    for match in re.finditer(pattern, ptx):
        yield ptx[: match.start()] + match.expand(replacement) + ptx[match.end() :]


SOME = [layout(8), layout(1000), layout(2056), layout(33, offset=1), layout(600, offset=1)]


def is_noticed(case: tuple, arch: int, code: str) -> bool:
    compiled, expected = emas(case, False, SOME)
    run(foreach_backend, expected._planner.plan, 0.3)
    try:
        with compiled_for(arch, lambda _: code):
            run(triton_backend, compiled._planner.plan, 0.3)
        assert_same(compiled, expected)
    except AssertionError:
        return True
    return False


CHANGES = {
    "a mask dropped": (r"@%p\d+ (?=(ld|st)\.global)", ""),
    "a difference turned round": (r"(sub\S*f32\s+%\w+), (%\w+), (%\w+);", r"\1, \3, \2;"),
    "a factor for a term": (r"(fma\S*f32\S*\s+%\w+), (%\w+), (%\w+), (%\w+)", r"\1, \2, \4, \3"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("case", [FP32, EXACT, MIXED], ids=str)
@pytest.mark.parametrize("arch", [90, pytest.param(100, marks=pytest.mark.every_target)])
def test_a_changed_instruction(arch: int, case: tuple, change: str) -> None:
    ptx = ptx_of(case, arch)
    assert not is_noticed(case, arch, ptx)
    codes = list(changed(ptx, *CHANGES[change]))
    assert codes
    assert all(is_noticed(case, arch, code) for code in codes)
