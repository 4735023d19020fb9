"""Whatever is done to either model between two updates, the EMA equals a float64 shadow.

The shadow is kept by name, in float64, and told of every write to the EMA model. One update errs by
at most the bound of tolerances.py, so after n updates the error is at most the sum of n bounds. An
exact EMA's errors are those of fp32, also through new plans, copies, checkpoints and swaps; its
weights show it rounded, and written ones are gone on from by a value that rounds to them. What is
excluded equals the online tensor of the last update, and where the online model is not finite a
guarded EMA stays as it is.
"""

import copy
from collections import Counter

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

from ema_triton import ModelEMA
from ema_triton.ops import foreach_backend
from ema_triton.ops.precision import PRECISIONS
from ema_triton.selection import Selection
from ema_triton.state import EMAState
from tests.states import saved
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

    @initialize(
        handle_buffers=st.sampled_from(["copy", "update"]),
        seed=st.integers(0, 1000),
        dtype=DTYPES,
        precision=st.sampled_from(PRECISIONS),
        exclude=st.sampled_from([(), "norm", ["square", "*.bias"]]),
        nonfinite=st.sampled_from(["propagate", "skip"]),
    )
    def build(
        self,
        handle_buffers: str,
        seed: int,
        dtype: torch.dtype = torch.float32,
        precision: str = "exact",
        exclude: str | list[str] | tuple[()] = (),
        nonfinite: str = "propagate",
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.online = Net().to(DEVICE, dtype)
        self.exclude = Selection.of(None, exclude, None)
        self.skipped: Counter[str] = Counter()
        self.ema = ModelEMA(
            self.online,
            handle_buffers=handle_buffers,
            backend=self.backend,
            precision=precision,
            exclude=exclude,
            nonfinite=nonfinite,
        )
        self.reset_shadow()

    def is_copied(self, name: str) -> bool:
        """Also by another name of the same tensor, if it is tied in both models."""
        tensors = self.averaged(self.ema.ema_model)
        online = self.averaged(self.online)
        names = [
            other
            for other in tensors
            if tensors[other].data_ptr() == tensors[name].data_ptr()
            and online[other].data_ptr() == online[name].data_ptr()
        ]
        return self.exclude.scale(names) is None

    def reset_shadow(self, *names: str, written: bool = False) -> None:
        """The EMA as it is now is the new truth, of these tensors or of all.

        Where its weights were written, it goes on from a value that rounds to them.
        """
        averaged = self.averaged(self.ema.ema_model)
        if not names:
            self.shadow, self.error = {}, {}
        for name in names or averaged:
            self.shadow[name] = averaged[name].double().clone()
            self.error[name] = torch.zeros_like(self.shadow[name])
            if written:
                self.error[name] = self.shows(name, averaged[name].dtype)

    def accumulates_in(self, dtype: torch.dtype, name: str) -> torch.dtype:
        low = dtype in (torch.bfloat16, torch.float16) and not self.is_copied(name)
        return torch.float32 if low and self.ema.precision == "exact" else dtype

    def shows(self, name: str, dtype: torch.dtype) -> Tensor:
        """How far the weight may be from what was accumulated: half a spacing."""
        if self.accumulates_in(dtype, name) == dtype:
            return torch.zeros_like(self.shadow[name])
        value = self.shadow[name].abs() + self.error[name]
        return update_bound(value, value, dtype) / 2

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
        self.ema.update(momentum)
        dtypes = {name: t.dtype for name, t in self.averaged(self.ema.ema_model).items()}
        for name, online in self.averaged(self.online).items():
            if self.is_copied(name):
                self.reset_shadow(name)
                self.shadow[name] = online.to(dtypes[name]).double().clone()
                continue
            # The machine makes nothing that is not finite where that propagates.
            finite = online.isfinite()
            self.skipped[name] += int(finite.numel() - finite.sum())
            online = torch.where(finite, online, 0)
            truth = torch.lerp(self.shadow[name], online.double(), momentum)
            truth = torch.where(finite, truth, self.shadow[name])
            before = self.shadow[name].abs() + self.error[name]
            bound = update_bound(before, online, self.accumulates_in(dtypes[name], name))
            if self.ema.precision == "stochastic":  # a spacing, after the arithmetic's own error
                bound += update_bound(before, online, torch.float32)
            # The momentum itself is rounded to fp32 where the arithmetic is fp32.
            bound += 2.0**-24 * (before + online.double().abs())
            self.shadow[name], self.error[name] = truth, self.error[name] + bound

    @rule()
    def write_online_in_place(self) -> None:
        with torch.no_grad():
            for tensor in self.averaged(self.online).values():
                tensor.copy_(self.random(tensor))
            self.online.steps += 1

    @precondition(lambda self: self.ema.nonfinite == "skip")
    @rule(value=st.sampled_from([float("nan"), float("inf"), -float("inf")]))
    def poison(self, value: float) -> None:
        with torch.no_grad():
            self.online.conv.weight[1, :2] = value

    @rule(fails=st.booleans())
    def evaluate_with_the_weights_swapped(self, fails: bool) -> None:
        before = copy.deepcopy(self.online.state_dict())
        self.ema.distance()  # a plan for the models as they are
        state = self.ema.state_dict(clone=True)
        tied, square = self.online.tied.weight, self.online.square.weight
        try:
            with self.ema.swapped() as model:
                inside = self.ema.state_dict()
                for name, tensor in self.averaged(model).items():
                    assert torch.equal(tensor, state["weights"][name].to(tensor.dtype)), name
                for kind in ("weights", "residuals"):
                    assert inside[kind].keys() == state[kind].keys()
                    for name, value in inside[kind].items():
                        assert torch.equal(value, state[kind][name]), name
                if fails:
                    raise KeyError
        except KeyError:
            assert fails
        except ValueError:  # the online model cannot hold both values
            assert tied.data_ptr() == square.data_ptr()
        for name, value in self.online.state_dict().items():
            assert torch.equal(value.nan_to_num(7), before[name].nan_to_num(7)), name

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
        changed = [
            name
            for name, tensor in self.averaged(self.ema.ema_model).items()
            if tensor.dtype != dtype
        ]
        self.ema.ema_model.to(dtype)
        if changed:
            self.reset_shadow(*changed, written=True)

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
            self.reset_shadow(written=True)

    @rule()
    def copy_into_the_ema_by_hand(self) -> None:
        self.ema.ema_model.conv.weight.data.copy_(self.random(self.online.conv.weight))
        self.ema.ema_model.norm.bias.data = self.random(self.ema.ema_model.norm.bias)
        self.reset_shadow("conv.weight", "norm.bias", written=True)

    @rule()
    def copy_into_the_ema_by_an_operation(self) -> None:
        with torch.no_grad():
            self.ema.ema_model.conv.weight.copy_(self.random(self.online.conv.weight))
            self.ema.ema_model.norm.bias.zero_()
        self.reset_shadow("conv.weight", "norm.bias", written=True)

    @rule()
    def sync(self) -> None:
        if not self.online.conv.weight.isfinite().all():
            return  # it would copy that
        self.ema.sync()
        self.reset_shadow()
        for name, online in self.averaged(self.online).items():
            ours = self.averaged(self.ema.ema_model)[name]
            distance = (ours.double() - online.double()).abs()
            # Halfway between two weights an exact EMA may show the other one.
            assert torch.equal(distance, (online.to(ours.dtype).double() - online).abs()), name
            kept = online.to(self.accumulates_in(ours.dtype, name)).double()
            if self.accumulates_in(ours.dtype, name) != ours.dtype:
                self.shadow[name] = kept

    @rule()
    def save_and_load(self) -> None:
        state = saved(self.ema.state_dict())
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
            assert (error <= self.error[name] + self.shows(name, ours.dtype)).all(), name
        if self.ema.nonfinite == "skip":
            assert Counter(self.ema.nonfinite_counts()) == self.skipped


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


def test_the_machine_notices_digits_lost_in_a_new_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = AnyOrder()
    machine.build("update", 0, torch.bfloat16)
    for channels_last in (True, False, True):
        machine.write_online_in_place()
        machine.update(0.3)
        machine.change_memory_format(channels_last, "online")
    machine.equals_the_shadow()
    monkeypatch.setattr(EMAState, "residual_of", lambda *args: None)
    for channels_last in (True, False, True):
        machine.write_online_in_place()
        machine.update(0.001)
        machine.change_memory_format(channels_last, "online")
    with pytest.raises(AssertionError):
        machine.equals_the_shadow()


def test_the_machine_notices_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = AnyOrder()
    machine.build("update", 0, nonfinite="skip")
    machine.poison(float("nan"))
    machine.update(0.3)
    machine.equals_the_shadow()
    monkeypatch.setattr(foreach_backend._Guard, "skip", lambda guard, step: None)
    machine.update(0.3)
    with pytest.raises(AssertionError):
        machine.equals_the_shadow()
