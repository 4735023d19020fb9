"""Launches of `ema_triton.ops.triton_backend`, compiled for an NVIDIA GPU and executed on the CPU.

Triton compiles for any GPU on any machine; all that it asks its driver is which GPU is there, and
`compiled_for` has the answer. What a kernel is launched with, constants and alignments included, is
what that module launches it with: a `Kernel` stands in the place of the jitted function there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ema_triton.ops import kernels, triton_backend
from ema_triton.plan import Launch
from ema_triton.state import CHUNK
from tests.ptx import machine
from tests.ptx.machine import Program
from tests.ptx.memory import Memory, Span

ARCHITECTURES = (80, 90, 100)

# Where it is active, `compiled_for` has others in their places.
UPDATE, SEVERAL, EXCHANGE = kernels.ema_update, kernels.ema_update_several, kernels.exchange

# Arguments that every block may read.
READ = ("table_ptr", "random_state_ptr", "random_state_ptrs", "momentum_ptr")

# Decoding takes longer than a small launch.
decoded = lru_cache(256)(Program)


class Kernel:
    """Stands in the place of a jitted function, and is launched in the same way."""

    def __init__(self, jitted: triton.JITFunction, edit: Callable[[str], str] = str) -> None:
        self.jitted, self.edit = jitted, edit
        self.everyone: list[Span] = []  # what all blocks may touch
        self.own: list[list[Span]] = []  # what each block may touch beside that

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int], *values: Any, **options: Any) -> None:
        compiled = self.jitted.warmup(*values, grid=grid, **options)
        signature = compiled.src.signature
        arguments = [
            (name, value)
            for name, given in zip(self.jitted.arg_names, values, strict=False)
            if signature[name] != "constexpr"
            for value in (given if isinstance(given, tuple) else [given])
        ]
        read = [Span.of(name, value) for name, value in arguments if name in READ]
        program = decoded(self.edit(compiled.asm["ptx"]))
        # Behind its arguments a program has pointers to scratch memory, which it does not use.
        values = [value for _, value in arguments]
        parameters = [*map(_bits, values), *[np.zeros((1, 1), "u8")] * 2]
        memory = Memory(self.everyone + read, self.own)
        program.run(machine.Launch(grid[0], parameters, compiled.metadata.shared, memory))


def _bits(value: Tensor | int | float) -> np.ndarray:
    if isinstance(value, Tensor):
        return np.full((1, 1), value.data_ptr(), "u8")
    if isinstance(value, int):
        return np.full((1, 1), value, "u4")
    return np.full((1, 1), value, "f8").view("u8")


@contextmanager
def compiled_for(architecture: int, edit: Callable[[str], str] = str) -> Iterator[None]:
    """Here `triton_backend.py` launches on CPU tensors, compiled for sm_80, sm_90 or sm_100.

    Args:
        architecture: 80, 90 or 100.
        edit: Changes the PTX before it is executed.
    """
    target = SimpleNamespace(
        get_current_device=lambda: architecture,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", architecture, 32),
    )
    update, several, exchange = (Kernel(one, edit) for one in (UPDATE, SEVERAL, EXCHANGE))
    launch_update, launch_exchange = triton_backend._launch, triton_backend.exchange
    launch_several = triton_backend._launch_several

    def updating(one: Launch, momentum: float | Tensor, chunks: int) -> None:
        update.own = spans_of(one)
        launch_update(one, momentum, chunks)

    def updating_several(together: list[tuple[Launch, float]], chunks: int) -> None:
        of_launches = [spans_of(one) for one, _ in together]
        several.own = [[*chain(*of_block)] for of_block in zip(*of_launches, strict=True)]
        launch_several(together, chunks)

    def exchanging(one: Launch) -> None:
        exchange.own = spans_of(one, exchanges=True)
        launch_exchange(one)

    before = dict(vars(driver))
    with pytest.MonkeyPatch.context() as patch:
        driver.set_active(target)
        patch.setattr(triton_backend, "unsupported_device", lambda device: None)
        patch.setattr(triton_backend, "ema_update", update)
        patch.setattr(kernels, "exchange", exchange)
        patch.setattr(triton_backend, "ema_update_several", several)
        patch.setattr(triton_backend, "_launch", updating)
        patch.setattr(triton_backend, "_launch_several", updating_several)
        patch.setattr(triton_backend, "exchange", exchanging)
        try:
            yield
        finally:
            vars(driver).update(before)


def spans_of(one: Launch, chunk: int = CHUNK, *, exchanges: bool = False) -> list[list[Span]]:
    """What each block of a launch may touch: its chunk of one tensor, and what is beside it."""
    found, bucket = [], one.bucket
    for member, offset, source in zip(one.members, one.offsets, one.sources, strict=True):
        name = bucket.names[member]
        for index, begin in enumerate(range(0, source.numel(), chunk)):
            end = min(begin + chunk, source.numel())
            online, ema = slice(begin, end), slice(offset + begin, offset + end)
            spans = [
                Span.of(f"EMA of {name}", bucket.flat, ema, writable=True),
                Span.of(f"online {name}", source, online, writable=exchanges),
            ]
            if bucket.residual is not None and not exchanges:
                beside = Span.of(f"residual of {name}", bucket.residual, ema, writable=True)
                spans.append(beside)
            if one.skip_counts is not None and not exchanges:
                number = bucket.first_chunks[member] + index
                count = slice(number, number + 1)
                spans.append(Span.of("its skip count", one.skip_counts, count, writable=True))
            found.append(spans)
    return found
