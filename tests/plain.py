"""An EMA in plain torch, tensor by tensor: what a state has to hold, bit by bit."""

import torch
from torch import Tensor, nn

LOW = (torch.bfloat16, torch.float16)


def wide(tensor: Tensor) -> Tensor:
    """A copy as an exact EMA accumulates it."""
    return tensor.float() if tensor.dtype in LOW else tensor.clone()


def is_averageable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


class PlainEMA:
    """What is averaged accumulates in fp32 (fp64); everything else is a copy."""

    def __init__(
        self, model: nn.Module, *, handle_buffers: str = "copy", excluded: str = ""
    ) -> None:
        self.model = model
        self.averaged = {
            name
            for name, _ in (
                *model.named_parameters(remove_duplicate=False),
                *(model.named_buffers() if handle_buffers == "update" else ()),
            )
            if not (excluded and name.startswith(excluded))
        }
        self.values = {name: wide(value) for name, value in model.state_dict().items()}

    def update(self, momentum: float) -> None:
        for name, online in self.model.state_dict().items():
            if name in self.averaged and is_averageable(online):
                ema = as_real(self.values[name])
                torch._foreach_lerp_([ema], [as_real(wide(online)).to(ema.dtype)], momentum)
            else:
                self.values[name] = wide(online)

    def check(self, weights: dict[str, Tensor]) -> None:
        """Assert that these are the nearest values of their dtypes."""
        assert weights.keys() == self.values.keys()
        for name, weight in weights.items():
            value = self.values[name]
            assert weight.shape == value.shape, name
            nearest = value.to(weight.dtype)
            if weight.dtype in LOW:
                # Halfway between two values, torch takes the even one.
                assert torch.equal(apart(weight, value), apart(nearest, value)), name
            else:
                assert weight.dtype == value.dtype, name
                assert torch.equal(weight, nearest), name


def apart(left: Tensor, right: Tensor) -> Tensor:
    return (left.double() - right.double()).abs()


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """The same names, dtypes, shapes and values."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        other = right[name]
        assert (value.dtype, value.shape) == (other.dtype, other.shape), name
        assert torch.equal(value.cpu(), other.cpu()), name


@torch.no_grad()
def move(model: nn.Module, step: int) -> None:
    """Change the online model as training would, by the same values for the same step."""
    generator = torch.Generator().manual_seed(1000 + step)
    tensors = sorted((*model.named_parameters(), *model.named_buffers()), key=lambda item: item[0])
    for _, tensor in tensors:
        if is_averageable(tensor):
            part = as_real(tensor)
            part.add_(torch.randn(part.shape, generator=generator, dtype=torch.float64).to(part))
        elif tensor.dtype != torch.bool:
            tensor.add_(1)
        else:
            tensor.logical_not_()
