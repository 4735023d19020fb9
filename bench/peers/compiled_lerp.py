"""torch.compile of the foreach lerp, its weight a tensor: a float would recompile at each value."""

import torch
from torch import Tensor, nn

from bench.peers import Built, copied, memory_of_copied

NAME = "torch.compile(foreach lerp)"

# The generated code grows with the tensors: 1000 take Inductor most of a minute.
LIMIT = 600

memory = memory_of_copied


def build(model: nn.Module, momentum: float, ema_dtype: torch.dtype) -> Built:
    """Compiled at the first update."""
    ema, online = copied(model, ema_dtype), [p.detach() for p in model.parameters()]
    if len(ema) > LIMIT:
        raise NotImplementedError(f"more than {LIMIT} tensors take minutes to compile")
    torch.compiler.reset()  # what was compiled for other models counts towards Dynamo's limit
    weight = torch.zeros((), device=ema[0].device)

    @torch.compile(fullgraph=True, dynamic=False)
    def lerp(ema: list[Tensor], online: list[Tensor], weight: Tensor) -> None:
        difference = torch._foreach_sub(online, ema)
        torch._foreach_add_(ema, torch._foreach_mul(difference, weight))

    def update(momentum: float) -> None:
        lerp(ema, online, weight.fill_(momentum))

    return Built(update, ema)
