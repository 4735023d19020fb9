"""What Hypothesis draws: shapes, layouts and values of online and EMA tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# (EMA dtype, online dtype). The kernel takes the first ten, the reference path all.
KERNEL_DTYPES = [
    (ema, online)
    for ema in (torch.float32, torch.bfloat16, torch.float16)
    for online in (torch.float32, torch.bfloat16, torch.float16)
] + [(torch.float64, torch.float64)]
REFERENCE_DTYPES = [(ema, online) for ema in FLOATS for online in FLOATS]

# Ends, both sides of the formula's switch at a half, and what long trainings use.
MOMENTA = st.one_of(
    st.sampled_from(
        [0.0, 1.0, 0.5, 0.5 - 2**-25, 0.5 + 2**-24, 2e-4, 1e-4, 1e-12, 1 - 2**-24, 2**-149]
    ),
    st.floats(0.0, 1.0),
)

# Lengths around what the kernel treats apart: nothing, a vector, a block, a chunk.
_LENGTHS = st.one_of(
    st.integers(0, 40),
    st.sampled_from(
        [511, 512, 513, 2047, 2048, 2056, 4095, 4096, 4097, 8184, 8191, 8192, 8193, 8200, 16385]
    ),
)


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory."""

    shape: tuple[int, ...]
    order: tuple[int, ...]  # the dimensions from the slowest to the fastest
    offset: int  # elements before the first one in its storage
    gap: int  # elements skipped between two along the fastest dimension

    def tensor(
        self, dtype: torch.dtype, device: torch.device, seed: int, largest: float | None
    ) -> Tensor:
        """Fill it with values of many magnitudes; and with NaN, Inf, subnormals and +-`largest`."""
        step = self.gap + 1
        stored = [self.shape[dim] for dim in self.order]
        room = self.offset + step * max(1, torch.Size(stored).numel())
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(room, generator=generator, dtype=torch.float64)
        values *= torch.exp2(torch.randint(-12, 6, (room,), generator=generator))
        if largest is not None:
            info = torch.finfo(dtype)
            extra = torch.tensor(
                [
                    float("nan"),
                    float("inf"),
                    -float("inf"),
                    0.0,
                    -0.0,
                    info.smallest_normal / 3,
                    -info.smallest_normal / 5,
                    largest,
                    -largest,
                ],
                dtype=torch.float64,
            )
            chosen = torch.randint(0, 4 * len(extra), (room,), generator=generator)
            values = torch.where(chosen < len(extra), extra[chosen % len(extra)], values)
        storage = values.to(dtype).to(device)
        strides, stride = [0] * len(self.shape), step
        for dim in reversed(self.order):
            strides[dim] = stride
            stride *= self.shape[dim]
        return storage.as_strided(self.shape, strides, self.offset)


@st.composite
def layouts(draw: st.DrawFn, *, gaps: bool = True) -> Layout:
    """Dense in any order of dimensions, at any offset, and now and then with gaps."""
    if draw(st.booleans()):
        shape: tuple[int, ...] = (draw(_LENGTHS),)
    else:
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=4)))
    order = tuple(draw(st.permutations(range(len(shape)))))
    offset = draw(st.sampled_from([0, 0, 1, 3, 4, 8]))
    gap = draw(st.sampled_from([0, 0, 0, 1])) if gaps else 0
    return Layout(shape, order, offset, gap)


def parameters(tensors: list[Tensor]) -> nn.ParameterList:
    """A module with these very tensors, at just these strides, as parameters."""
    module = nn.ParameterList([nn.Parameter(torch.empty(0)) for _ in tensors])
    for parameter, tensor in zip(module, tensors, strict=True):
        parameter.data = tensor
    return module
