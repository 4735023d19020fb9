"""What `bench run` and `bench tune` average into what."""

from typing import NamedTuple

import torch

from ema_triton.ops.precision import RESIDUAL_DTYPE


class Case(NamedTuple):
    """What is averaged into what; a precision that only ours have is measured for ours alone."""

    ema_dtype: torch.dtype
    online_dtype: torch.dtype
    precision: str = "nearest"

    @property
    def stored(self) -> int:
        """Bytes of an element of the EMA."""
        exact = self.precision == "exact"
        return self.ema_dtype.itemsize + (RESIDUAL_DTYPE[self.ema_dtype].itemsize if exact else 0)

    @property
    def moved(self) -> int:
        """Bytes that an update must move per element: online once in, EMA once in and once out."""
        return self.online_dtype.itemsize + 2 * self.stored


CASES = {
    "fp32<-fp32": Case(torch.float32, torch.float32),
    "fp32<-bf16": Case(torch.float32, torch.bfloat16),
    "bf16<-bf16": Case(torch.bfloat16, torch.bfloat16),
    "bf16<-bf16 exact": Case(torch.bfloat16, torch.bfloat16, "exact"),
    "bf16<-bf16 stochastic": Case(torch.bfloat16, torch.bfloat16, "stochastic"),
}
