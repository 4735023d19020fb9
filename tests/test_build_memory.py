"""Building an EMA takes no more memory at its peak than it keeps, but for a scratch."""

import copy
import functools
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from ema_triton import ModelEMA

MIB = 1 << 20
# What may come on top, however large the model is: four times 1M elements of fp32; the largest
# tensor has 16M. The first update makes a scratch of up to eight.
BUILDING, UPDATING = 16 * MIB, 32 * MIB
# And stay: 40 bytes per chunk of 4096 elements and 16 per tensor are less than a quarter of it.
KEPT = MIB

LARGE, SMALL = 4096 * 4096, 2048 * 4096
ELEMENTS = LARGE + SMALL + 4096 + 2048
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def network(dtype: torch.dtype, *, tied: bool = False, turned: bool = False) -> nn.Module:
    """96 MiB of fp32, 64 of them in one tensor; tied, that is there under two names."""
    model = nn.Sequential()
    model.body = nn.Linear(4096, 4096, device="meta")
    model.head = nn.Linear(4096, 2048, device="meta")
    model = model.to(dtype).to_empty(device="cpu")
    if tied:
        model.twin = nn.Linear(4096, 4096, bias=False, device="meta")
        model.twin.weight = model.body.weight
    with torch.no_grad():
        for parameter in model.parameters():
            if turned and parameter.dim() == 2:
                parameter.data = parameter.data.t().contiguous().t()
            parameter.fill_(1.5)
    return model


class Case(NamedTuple):
    """A model, the options of its EMA, and how many bytes that has to keep."""

    model: dict[str, Any]
    options: dict[str, Any]
    kept: int


CASES = {
    "fp32": Case({"dtype": FP32}, {}, 4 * ELEMENTS),
    "fp32, tied": Case({"dtype": FP32, "tied": True}, {}, 4 * ELEMENTS),
    "bf16, exact": Case({"dtype": BF16}, {}, 4 * ELEMENTS),
    "fp16, exact": Case({"dtype": FP16}, {}, 6 * ELEMENTS),
    "bf16, stochastic": Case({"dtype": BF16}, {"precision": "stochastic"}, 2 * ELEMENTS),
    "fp32 in exact bf16": Case({"dtype": FP32}, {"ema_dtype": BF16}, 4 * ELEMENTS),
    "bf16 in fp32": Case({"dtype": BF16}, {"ema_dtype": FP32}, 4 * ELEMENTS),
}
# Without a module around it: the same, but for parameters that are not averaged.
CASES |= {
    f"{name}, no module": Case(case.model, {**case.options, "as_module": False}, case.kept)
    for name, case in CASES.items()
}
CASES |= {
    "fp32, turned": Case({"dtype": FP32, "turned": True}, {}, 4 * ELEMENTS),
    "fp32, guarded": Case({"dtype": FP32}, {"nonfinite": "skip"}, 4 * ELEMENTS),
    "bf16, nearest": Case({"dtype": BF16}, {"precision": "nearest"}, 2 * ELEMENTS),
    "fp32, exclude body": Case({"dtype": FP32}, {"exclude": "body"}, 4 * ELEMENTS),
    # What is copied has no residual.
    "bf16, exact, exclude body": Case(
        {"dtype": BF16}, {"exclude": "body"}, 2 * ELEMENTS + 2 * (SMALL + 2048)
    ),
}
for name, dtype in (("fp32", FP32), ("bf16, exact", BF16)):
    CASES |= {
        f"{name}, {option} {pattern}, no module": Case(
            {"dtype": dtype}, {option: pattern, "as_module": False}, 4 * (SMALL + 2048)
        )
        for option, pattern in (("exclude", "body"), ("include", "head"))
    }


def deep_copied(model: nn.Module) -> Any:
    """The control: a copy that is laid flat then."""
    twin = copy.deepcopy(model)
    flat = torch.cat([parameter.data.flatten() for parameter in twin.parameters()])
    begin = 0
    for parameter in twin.parameters():
        parameter.data = flat[begin : begin + parameter.numel()].view(parameter.shape)
        begin += parameter.numel()
    return twin


def measured(function: Callable[[], object]) -> tuple[int, int, Any]:
    """How many bytes of tensors a call kept and had at its peak, and what it returned."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
        gc.collect()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return now, peak, result


def measure(case: Case) -> list[int]:
    """What building the EMA keeps, its peak, and the peak of the first update."""
    model = network(**case.model)
    kept, peak, ema = measured(lambda: ModelEMA(model, backend="foreach", **case.options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(2.5)
    _, updating, _ = measured(lambda: ema.update(0.5))
    # That it is an EMA: halfway from 1.5, or copied.
    weights = ema.state_dict()["weights"]
    assert {float(value) for w in weights.values() for value in w.aminmax()} <= {2.0, 2.5}
    assert weights["head.weight"].max() == 2.0
    return [kept, peak, updating]


def main() -> None:
    """Print the figures of all cases, or why there are none; and of the control."""
    torch.set_num_threads(1)
    model = network(FP32)
    copied = measured(lambda: deep_copied(model))[:2]
    temporary = measured(lambda: (model.body.weight + 1).sum())[:2]
    figures: dict[str, object] = {"control": [*copied, *temporary]}
    ModelEMA(nn.Linear(2, 2))  # what is imported or made once
    for name, case in CASES.items():
        try:
            figures[name] = measure(case)
        except Exception as error:
            figures[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(figures))  # noqa: T201


@functools.cache
def figures() -> dict[str, Any]:
    """From a process of its own, where nothing else allocates."""
    done = subprocess.run(
        [sys.executable, "-c", "from tests.test_build_memory import main; main()"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_measure_sees_a_copy_and_a_temporary() -> None:
    kept, peak, of_sum, temporary = figures()["control"]
    assert abs(kept - 4 * ELEMENTS) < KEPT
    assert peak >= 8 * ELEMENTS
    assert of_sum < 1024
    assert temporary >= 4 * LARGE > UPDATING


@pytest.mark.parametrize("name", CASES)
def test_the_peak_is_what_is_kept(name: str) -> None:
    found = figures()[name]
    assert isinstance(found, list), found
    kept, peak, updating = found
    expected = CASES[name].kept
    assert expected <= kept < expected + KEPT
    assert peak < kept + BUILDING
    assert updating < UPDATING
