"""`python -m bench host`: where the microseconds of a call of `update()` go, on the host.

The models have their architectures' tensors, but each with no more than two elements a side, so
that the device has next to nothing to do and is idle before each call. On a CPU the averaging is
the host's too, and stands where the launch is on a GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from bench import peers
from bench.machine import commit, describe
from bench.models import Model, make_module
from bench.results import Spread
from bench.run import chosen_device, selected_models
from ema_triton import Constant, EMABank, ModelEMA

CALLS = 300
MOMENTUM = 0.1
AVERAGES = 3
RIVALS = ("ignite", "foreach_lerp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument(
        "--models", default="resnet50,vit-l16,1000x64,sdxl-unet", help="default: %(default)s"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")


def main(args: argparse.Namespace) -> None:
    """Measure, and print a table per model."""
    device = chosen_device(args)
    machine = describe(device)
    torch_version = machine.packages["torch"]
    print(f"{machine.name}; host {machine.cpu}; torch {torch_version}; commit {commit()}")
    print(f"medians of {CALLS} calls, microseconds")
    for model in selected_models(args.models, quick=False, on_cpu=False):
        print(f"\n{model.name}, {len(model.shapes)} tensors")
        for name, microseconds in measured(shrunk(model), device, CALLS).items():
            print(f"{microseconds:9.1f}  {name}")


def shrunk(model: Model) -> Model:
    """The same tensors with at most two elements a side."""
    shapes = {name: tuple(min(2, n) for n in shape) for name, shape in model.shapes.items()}
    return replace(model, shapes=shapes)


def measured(model: Model, device: torch.device, calls: int) -> dict[str, float]:
    """Microseconds of a call of `update()`, of its parts, and of rivals' updates."""
    online = make_module(model, torch.float32, device)
    ema = ModelEMA(online)
    ema.update(MOMENTUM)
    plan = ema._planner.plan

    def copies() -> None:
        plan.copies.write(plan.copies.read() or [])

    @torch.no_grad()
    def average() -> None:
        for launch in plan.launches:
            launch.backend.update(launch, MOMENTUM)

    parts: dict[str, Callable[[], object]] = {
        "  looking whether a tensor moved": plan.staleness.is_stale,
        "  copying what is not averaged": copies,
        f"  averaging ({ema.backend})": average,
        "  telling autograd of the write": plan.bump_versions,
    }
    found = {"update()": median(lambda: ema.update(MOMENTUM), device, calls)}
    found |= {name: median(part, device, calls) for name, part in parts.items()}
    total, *rest = found.values()
    found["  the rest: arguments, locks, guards"] = total - sum(rest)
    bank = EMABank(online, {str(number): Constant(MOMENTUM) for number in range(AVERAGES)})
    singles = [ModelEMA(online) for _ in bank]
    found[f"EMABank of {AVERAGES}"] = median(bank.update, device, calls)
    found[f"{AVERAGES} ModelEMA one by one"] = median(
        lambda: [single.update(MOMENTUM) for single in singles], device, calls
    )
    for key in RIVALS:
        try:
            peer = peers.load(key)
        except ImportError:
            continue
        with torch.no_grad():
            built = peer.build(online, MOMENTUM, torch.float32)
            found[peer.NAME] = median(partial(built.update, MOMENTUM), device, calls)
    return found


def median(call: Callable[[], object], device: torch.device, calls: int) -> float:
    """Microseconds until the call returns; the device is idle when it begins."""
    samples = []
    for _ in range(calls + 10):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        samples.append(1e6 * (time.perf_counter() - start))
    return Spread.of(samples[10:]).median
