"""Float64 truth, computed without any of the library's code."""

import torch
from torch import Tensor


def lerp(ema: Tensor, online: Tensor, momentum: float) -> Tensor:
    """(1 - momentum) * ema + momentum * online in float64, exact at the momenta 0 and 1.

    At 0 torch.lerp's formula (which the contract names) multiplies the difference by 0, so a
    non-finite difference still gives NaN; the plain sum would differ there. At 1 it is a copy.
    """
    ema, online = ema.double(), online.double()
    if momentum == 1:
        return online
    if momentum < 0.5:
        return ema + momentum * (online - ema)
    return online - (online - ema) * (1 - momentum)


class Shadow:
    """A float64 EMA of one model's tensors, by name."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values = {name: value.detach().double().clone() for name, value in values.items()}

    def update(self, online: dict[str, Tensor], momentum: float) -> None:
        for name, value in self.values.items():
            self.values[name] = torch.lerp(value, online[name].detach().double(), momentum)
