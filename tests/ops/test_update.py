"""One update against float64 truth: the reference path and the kernel, over everything drawn."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ema_triton.ops import foreach_backend
from ema_triton.ops.precision import PRECISIONS
from tests import oracle
from tests.plans import plan_of, run
from tests.strategies import KERNEL_DTYPES, MOMENTA, REFERENCE_DTYPES, Layout, layouts, parameters
from tests.tolerances import assert_update, update_bound

triton_backend = pytest.importorskip("ema_triton.ops.triton_backend")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
UPDATES = {"reference": partial(run, foreach_backend), "kernel": partial(run, triton_backend)}


def check(
    path: str,
    cases: list[tuple[Layout, tuple[torch.dtype, torch.dtype]]],
    momentum: float,
    seed: int,
    special: bool,
    as_tensor: bool = False,
    precision: str = "nearest",
) -> None:
    online, ema = [], []
    for index, (layout, dtypes) in enumerate(cases):
        # So that neither the difference nor the result leaves the range of either dtype.
        largest = min(torch.finfo(dtype).max for dtype in dtypes) / 4 if special else None
        ema.append(layout.tensor(dtypes[0], DEVICE, seed + 1000 + index, largest).clone())
        online.append(layout.tensor(dtypes[1], DEVICE, seed + index, largest))
    before = [tensor.clone() for tensor in ema]
    online_before = [tensor.clone() for tensor in online]
    ema_module = parameters(ema)
    plan = plan_of(parameters(online), ema_module, precision)
    weight = torch.tensor(momentum, device=DEVICE) if as_tensor else momentum
    UPDATES[path](plan, weight)

    for (_, (ema_dtype, online_dtype)), old, new, result in zip(
        cases, before, online_before, ema_module, strict=True
    ):
        # The momentum as the arithmetic knows it.
        double = torch.float64 in (ema_dtype, online_dtype) and not as_tensor
        exact = momentum if double else torch.tensor(momentum, dtype=torch.float32).item()
        truth = oracle.lerp(old, new, exact)
        if momentum == 1 and not as_tensor:
            old = new  # a copy, whatever was there, even NaN
        elif exact == 1:  # rounded to it, or not known to be 1 where a copy would be chosen
            truth = torch.lerp(old.double(), new.double(), exact)
        assert result.dtype == ema_dtype
        bound = update_bound(old, new, ema_dtype)
        if precision == "stochastic":  # a whole spacing, after the arithmetic's own error
            bound += update_bound(old, new, torch.float32)
        assert_update(result.detach(), truth, bound)
    for tensor, untouched in zip(online, online_before, strict=True):
        assert torch.equal(tensor.nan_to_num(), untouched.nan_to_num()), "an online tensor changed"


def cases(dtypes: list[tuple[torch.dtype, torch.dtype]]) -> st.SearchStrategy:
    return st.lists(st.tuples(layouts(), st.sampled_from(dtypes)), min_size=1, max_size=6)


SEEDS, FLAGS = st.integers(0, 2**31), st.tuples(st.booleans(), st.booleans())


@given(cases(REFERENCE_DTYPES), MOMENTA, SEEDS, FLAGS, st.sampled_from(PRECISIONS))
def test_reference(
    cases: list, momentum: float, seed: int, flags: tuple[bool, bool], precision: str
) -> None:
    check("reference", cases, momentum, seed, *flags, precision)


@given(cases(KERNEL_DTYPES), MOMENTA, SEEDS, FLAGS, st.sampled_from(PRECISIONS))
def test_kernel(
    cases: list, momentum: float, seed: int, flags: tuple[bool, bool], precision: str
) -> None:
    check("kernel", cases, momentum, seed, *flags, precision)


@pytest.mark.parametrize("path", UPDATES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("ema_dtype", "online_dtype"), KERNEL_DTYPES)
def test_every_dtype_pair(
    path: str, precision: str, ema_dtype: torch.dtype, online_dtype: torch.dtype
) -> None:
    shapes = [(), (1,), (7,), (33, 65), (8200,), (0, 3)]
    layout = [Layout(shape, tuple(range(len(shape))), 0, 0) for shape in shapes]
    for momentum in (0.0, 2e-4, 0.5, 1.0):
        cases = [(one, (ema_dtype, online_dtype)) for one in layout]
        check(path, cases, momentum, 7, True, precision=precision)


def test_the_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout((1000,), (0,), 0, 0)
    half = (torch.float32, torch.float32)
    right = UPDATES["reference"]
    monkeypatch.setitem(UPDATES, "reference", lambda plan, m: right(plan, m * (1 + 1e-5)))
    with pytest.raises(AssertionError, match="exceeds its bound"):
        check("reference", [(layout, half)], 0.3, 0, False)
