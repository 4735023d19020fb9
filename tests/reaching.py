"""Every kernel over tensors that end where their memory ends; run by test_gpu_memory.py.

`python -m tests.reaching DEVICE few | small | huge | control`. The control takes eight elements
more than a tensor has.
"""

import sys

import torch
from torch import nn

from ema_triton import Constant, EMABank, ModelEMA

FLOATING = (torch.float32, torch.bfloat16, torch.float16)
# Empty, single, ragged, whole vectors, whole chunks, one element more.
LENGTHS = (0, 1, 5, 8, 24, 101, 4095, 4096, 4097, 8191, 8192, 8193, 16392)


def model_of(dtype: torch.dtype, device: str) -> nn.ParameterList:
    """Each length in an allocation of its own, from its beginning and from its second element."""
    model = nn.ParameterList()
    for length in LENGTHS:
        for skip in (0, 1):
            parameter = nn.Parameter(torch.empty(0, dtype=dtype, device=device))
            parameter.data = torch.randn(length + skip, device=device).to(dtype)[skip:]
            model.append(parameter)
    return model


def few(device: str) -> None:
    """One pair of dtypes, for a look at this program itself."""
    for precision in ("nearest", "exact", "stochastic"):
        reach(torch.bfloat16, torch.bfloat16, precision, "skip", device)


def small(device: str) -> None:
    """All dtypes, precisions and kernels."""
    dtypes = [(ema, online) for ema in FLOATING for online in FLOATING]
    for ema_dtype, online_dtype in [*dtypes, (torch.float64, torch.float64)]:
        for precision in ("nearest", "exact", "stochastic"):
            for nonfinite in ("propagate", "skip"):
                reach(ema_dtype, online_dtype, precision, nonfinite, device)


def reach(
    ema_dtype: torch.dtype, online_dtype: torch.dtype, precision: str, nonfinite: str, device: str
) -> None:
    """Updates, a swap; two and three averages at once."""
    options = {"backend": "triton", "ema_dtype": ema_dtype}
    options |= {"precision": precision, "nonfinite": nonfinite}
    ema = ModelEMA(model_of(online_dtype, device), **options)
    for momentum in (0.1, 1.0, torch.tensor(0.5, device=device)):
        ema.update(momentum)
    with ema.swapped():
        pass
    for count in (2, 3):
        schedules = {str(number): Constant(0.1) for number in range(count)}
        EMABank(ema.model, schedules, **options).update()


def huge(device: str) -> None:
    """More than 2**31 elements in one bucket."""
    size = 2**31 + 8192 + 3
    model = nn.ParameterList([nn.Parameter(torch.empty(0, dtype=torch.bfloat16, device=device))])
    model[0].data = torch.ones(size, dtype=torch.bfloat16, device=device)
    ema = ModelEMA(model, backend="triton", precision="nearest")
    ema.update(0.5)
    assert ema.ema_model[0][-5:].eq(1.0).all()


def control(device: str) -> None:
    """An update that must be complained of."""
    model = nn.ParameterList([nn.Parameter(torch.ones(64, device=device))])
    ema = ModelEMA(model, backend="triton")
    ema._planner.plan.launches[0].chunk_table[0, 2] += 16
    ema.update(0.5)


if __name__ == "__main__":
    torch.manual_seed(0)
    {"few": few, "small": small, "huge": huge, "control": control}[sys.argv[2]](sys.argv[1])
    if sys.argv[1] == "cuda":
        torch.cuda.synchronize()
    sys.stdout.write("fine\n")
