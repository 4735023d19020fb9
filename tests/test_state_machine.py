"""Whatever is done to either model between two updates, the EMA equals a float64 shadow.

The shadow is kept by name, in float64, and told of every write to the EMA model. One update errs by
at most the bound of tolerances.py, so after n updates the error is at most the sum of n bounds.
"""

import copy
import io

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

from ema_triton import ModelEMA
from tests.tolerances import update_bound

# A bf16 EMA may lose what a small momentum adds; the bound knows.
pytestmark = pytest.mark.filterwarnings("ignore:momentum .* is below the resolution:UserWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.square = nn.Linear(4, 4, bias=False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.square.weight
        self.register_buffer("steps", torch.tensor(0))


class AnyOrder(RuleBasedStateMachine):
    backend = "foreach"

    @initialize(handle_buffers=st.sampled_from(["copy", "update"]), seed=st.integers(0, 1000))
    def build(self, handle_buffers: str, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.online = Net().to(DEVICE)
        self.ema = ModelEMA(self.online, handle_buffers=handle_buffers, backend=self.backend)
        self.reset_shadow()

    def reset_shadow(self) -> None:
        """The EMA as it is now is the new truth."""
        averaged = self.averaged(self.ema.ema_model)
        self.shadow = {name: tensor.double().clone() for name, tensor in averaged.items()}
        self.error = {name: torch.zeros_like(t) for name, t in self.shadow.items()}

    def averaged(self, model: nn.Module) -> dict[str, Tensor]:
        found = dict(model.named_parameters(remove_duplicate=False))
        if self.ema.handle_buffers == "update":
            found |= {name: b for name, b in model.named_buffers() if b.is_floating_point()}
        return {name: tensor.detach() for name, tensor in found.items()}

    def random(self, like: Tensor) -> Tensor:
        values = torch.randn(like.shape, generator=self.generator, dtype=torch.float64)
        return values.to(like)

    @rule(momentum=st.sampled_from([0.0, 0.001, 0.3, 0.5, 0.9, 1.0]))
    def update(self, momentum: float) -> None:
        before = {name: t.clone() for name, t in self.averaged(self.ema.ema_model).items()}
        self.ema.update(momentum)
        for name, online in self.averaged(self.online).items():
            truth = torch.lerp(self.shadow[name], online.double(), momentum)
            bound = update_bound(before[name], online, before[name].dtype)
            # The momentum itself is rounded to fp32 where the arithmetic is fp32.
            bound += 2.0**-24 * (before[name].double() - online.double()).abs()
            self.shadow[name], self.error[name] = truth, self.error[name] + bound

    @rule()
    def write_online_in_place(self) -> None:
        with torch.no_grad():
            for tensor in self.averaged(self.online).values():
                tensor.copy_(self.random(tensor))
            self.online.steps += 1

    @rule()
    def assign_data(self) -> None:
        for module in (self.online.conv, self.online.square):
            module.weight.data = self.random(module.weight)

    @rule()
    def assign_a_transposed_view(self) -> None:
        self.online.square.weight.data = self.online.square.weight.data.t()

    @rule()
    def replace_a_parameter(self) -> None:
        self.online.conv.bias = nn.Parameter(self.random(self.online.conv.bias))

    @rule()
    def replace_a_module(self) -> None:
        old = self.online.norm.weight
        self.online.norm = nn.BatchNorm2d(4).to(old)

    @rule()
    def untie(self) -> None:
        self.online.tied.weight = nn.Parameter(self.random(self.online.square.weight))

    @rule()
    def tie(self) -> None:
        self.online.tied.weight = self.online.square.weight

    @rule(dtype=DTYPES)
    def cast_online(self, dtype: torch.dtype) -> None:
        self.online.to(dtype)

    @rule(dtype=DTYPES)
    def cast_ema(self, dtype: torch.dtype) -> None:
        self.ema.ema_model.to(dtype)
        self.reset_shadow()

    @rule(channels_last=st.booleans(), which=st.sampled_from(["online", "ema"]))
    def change_memory_format(self, channels_last: bool, which: str) -> None:
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        model = self.online if which == "online" else self.ema.ema_model
        model.to(memory_format=memory_format)

    @rule(frozen=st.booleans())
    def freeze(self, frozen: bool) -> None:
        self.online.requires_grad_(not frozen)

    @rule(assign=st.booleans(), which=st.sampled_from(["online", "ema"]))
    def load_a_module_state(self, assign: bool, which: str) -> None:
        model = self.online if which == "online" else self.ema.ema_model
        state = {name: self.random(t) for name, t in model.state_dict().items()}
        if model.tied.weight is model.square.weight:
            state["tied.weight"] = state["square.weight"]
        model.load_state_dict(state, assign=assign)
        if which == "ema":
            self.reset_shadow()

    @rule()
    def copy_into_the_ema_by_hand(self) -> None:
        self.ema.ema_model.conv.weight.data.copy_(self.random(self.online.conv.weight))
        self.ema.ema_model.norm.bias.data = self.random(self.ema.ema_model.norm.bias)
        self.reset_shadow()

    @rule()
    def sync(self) -> None:
        self.ema.sync()
        self.reset_shadow()
        for name, online in self.averaged(self.online).items():
            ours = self.averaged(self.ema.ema_model)[name]
            assert torch.equal(ours, online.to(ours.dtype)), name

    @rule()
    def save_and_load(self) -> None:
        file = io.BytesIO()
        torch.save(self.ema.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        with torch.no_grad():
            for tensor in self.ema.ema_model.parameters():
                tensor.fill_(float("nan"))
        self.ema.load_state_dict(state)

    @rule()
    def go_on_with_a_copy(self) -> None:
        self.ema = copy.deepcopy(self.ema)
        self.online = self.ema.model

    @invariant()
    @precondition(lambda self: hasattr(self, "ema"))
    def equals_the_shadow(self) -> None:
        for name, ours in self.averaged(self.ema.ema_model).items():
            error = (ours.double() - self.shadow[name]).abs()
            assert (error <= self.error[name]).all(), name


class AnyOrderInTheKernel(AnyOrder):
    backend = "triton"


TestForeach = AnyOrder.TestCase
TestForeach.settings = settings(stateful_step_count=30)


class TestTriton(AnyOrderInTheKernel.TestCase):
    settings = settings(stateful_step_count=30, max_examples=settings().max_examples // 2)

    def runTest(self) -> None:  # noqa: N802
        pytest.importorskip("triton")
        super().runTest()


def test_the_machine_notices_an_update_that_is_slightly_wrong() -> None:
    machine = AnyOrder()
    machine.build("update", 0)
    machine.write_online_in_place()
    right = machine.ema.update
    machine.ema.update = lambda momentum: right(momentum * (1 + 1e-5))
    machine.update(0.3)
    with pytest.raises(AssertionError):
        machine.equals_the_shadow()
