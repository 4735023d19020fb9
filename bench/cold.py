"""`python -m bench cold`: a process's first update, with and without Triton's cache.

Each measurement is a process of its own, which has a model and an optimizer already. (The optimizer
imports torch._dynamo, which the first update would import otherwise: a second that every training
pays anyway.) Building the EMA compiles the kernel, or reads it from the cache; Triton hashes its
own files first, once per process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

from bench.machine import commit, describe
from bench.run import chosen_device

REPEATS = 3

PROGRAM = """
import json, sys, time

def seconds(call):
    start = time.perf_counter()
    result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result

start = time.perf_counter()
import torch
from torch import nn
times = {"import torch": time.perf_counter() - start}
device, dtype = sys.argv[1], getattr(torch, sys.argv[2])
layers = [nn.Sequential(nn.Linear(256, 256), nn.BatchNorm1d(256)) for _ in range(50)]
model = nn.Sequential(*layers).to(device, dtype)
torch.optim.SGD(model.parameters(), lr=0.1)

def imported():
    global ModelEMA
    from ema_triton import ModelEMA

times["import ema_triton"], _ = seconds(imported)
times["build the EMA"], ema = seconds(lambda: ModelEMA(model))
times["first update"], _ = seconds(lambda: ema.update(0.1))
times["second update"], _ = seconds(lambda: ema.update(0.1))
print(json.dumps({"backend": ema.backend, "times": times}))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")


def main(args: argparse.Namespace) -> None:
    """Measure, and print a table."""
    device = chosen_device(args)
    machine = describe(device)
    print(f"{machine.name}; host {machine.cpu}; {machine.packages}; commit {commit()}")
    print(f"medians of {REPEATS} processes, milliseconds")
    for dtype in ("float32", "bfloat16"):
        for name, (backend, times) in measured(device.type, dtype).items():
            print(f"\n{dtype}, backend {backend}, {name}")
            for part, milliseconds in times.items():
                print(f"{milliseconds:9.1f}  {part}")


def measured(
    device: str, dtype: str, repeats: int = REPEATS
) -> dict[str, tuple[str, dict[str, float]]]:
    """The backend, and the milliseconds of each part, with an empty and with a filled cache."""
    runs: dict[str, list[dict]] = {"Triton's cache empty": [], "Triton's cache filled": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            for found in runs.values():
                found.append(_in_a_process(device, dtype, cache))
    return {
        name: (
            found[0]["backend"],
            {
                part: 1e3 * statistics.median(run["times"][part] for run in found)
                for part in found[0]["times"]
            },
        )
        for name, found in runs.items()
    }


def _in_a_process(device: str, dtype: str, cache: str) -> dict:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, device, dtype],
        env={**os.environ, "TRITON_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        raise SystemExit(f"the process that was to be measured failed:\n{run.stderr}")
    found: dict = json.loads(run.stdout)
    return found
