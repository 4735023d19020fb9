"""`follow` of optimizers inside optimizers: one update for each real step, however it is driven."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from ema_triton import ModelEMA
from ema_triton.schedules import Constant, LinearWarmup

WARMUP = LinearWarmup(0.5, 0.1, 4)


class SAM(Optimizer):
    """Sharpness-aware minimization in its popular form, with the same methods and attributes."""

    def __init__(self, params: Any, base: Callable[..., Optimizer], **options: Any) -> None:
        super().__init__(params, options)
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups
        self.moved: list[Tensor] = []

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.moved = [0.05 * p.grad.sign() for p in parameters]
        torch._foreach_add_(parameters, self.moved)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        torch._foreach_sub_(parameters, self.moved)
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> None:
        closure = torch.enable_grad()(closure)
        closure()
        self.first_step(zero_grad=True)
        closure()
        self.second_step()


class Lookahead(Optimizer):
    """Pulls the weights back to slow ones after every second step of the optimizer inside."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer.param_groups, {})
        self.keep(optimizer)

    def keep(self, optimizer: Optimizer) -> None:
        self.optimizer, self.param_groups, self.steps = optimizer, optimizer.param_groups, 0
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        self.optimizer.step(closure)
        self.steps += 1
        if self.steps % 2 == 0:
            fast = [p.data for group in self.param_groups for p in group["params"]]
            torch._foreach_lerp_(self.slow, fast, 0.5)
            torch._foreach_copy_(fast, self.slow)


class WithoutHooks(Lookahead):
    """As timm's: under another name, and no `__init__` of torch's makes its `step` call hooks."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.keep(optimizer)

    @property
    def optimizer(self) -> None:
        return None

    @optimizer.setter
    def optimizer(self, optimizer: Optimizer) -> None:
        self._base_optimizer = optimizer

    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        self._base_optimizer.step(closure)


class Lightning:
    """Of the shape of Lightning's: a class made for each optimizer, with the optimizer's dict."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k != "step"}
        self.__class__ = type(
            "Lightning" + type(optimizer).__name__, (Lightning, type(optimizer)), {}
        )
        self._optimizer = optimizer

    @property
    def optimizer(self) -> Optimizer:
        return self._optimizer

    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        self._optimizer.step(closure)


class Plain:
    """As apex's and fairscale's: no torch Optimizer, without `param_groups`."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        self.optimizer.step(closure)


def accelerated(optimizer: Optimizer) -> Optimizer:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare(optimizer)


WRAPPERS: dict[str, Callable[[Optimizer], Any]] = {
    "Lookahead": Lookahead,
    "timm's Lookahead": WithoutHooks,
    "Lightning's": Lightning,
    "no Optimizer": Plain,
    "accelerate's": accelerated,
    "no Optimizer around Lookahead": lambda optimizer: Plain(Lookahead(optimizer)),
    "Lookahead around Lookahead": lambda optimizer: Lookahead(Lookahead(optimizer)),
    "accelerate's around no Optimizer": lambda optimizer: accelerated(Lookahead(optimizer)),
    "Lightning's around SGD with a scheduler": lambda optimizer: (
        torch.optim.lr_scheduler.StepLR(optimizer, 100) and Lightning(optimizer)
    ),
}


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))


def closure_of(model: nn.Module, optimizer: Any) -> Callable[[], Tensor]:
    x = torch.randn(5, 3)

    def closure() -> Tensor:
        model.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    return closure


def contents(ema: ModelEMA) -> dict[str, Tensor]:
    return ema.state_dict(clone=True)["weights"]


def same(one: ModelEMA, other: ModelEMA) -> bool:
    left, right = contents(one), contents(other)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("options", ["a copy", "as_module=False", "given"])
@pytest.mark.parametrize("driven", ["by step", "by first_step and second_step", "both in turns"])
@pytest.mark.parametrize("wrap", [None, Plain, accelerated])
def test_a_step_of_sam_is_one_update(wrap: Callable | None, driven: str, options: str) -> None:
    model = network()
    sam = SAM(model.parameters(), SGD, lr=0.1, momentum=0.9)
    given = copy.deepcopy(model) if options == "given" else None
    following = ModelEMA(model, ema_model=given, as_module=options != "as_module=False")
    by_hand = ModelEMA(model)
    following.follow(sam if wrap is None else wrap(sam), WARMUP)
    for count in range(1, 7):
        closure = closure_of(model, sam)
        before = [p.detach().clone() for p in model.parameters()]
        if driven == "by step" or (driven == "both in turns" and count % 2):
            sam.step(closure)
        else:
            closure()
            sam.first_step(zero_grad=True)
            assert following.update_index == count - 1
            closure()
            sam.second_step(zero_grad=True)
        assert not all(map(torch.equal, before, model.parameters()))
        by_hand.update(WARMUP(count))
        assert following.update_index == count
        assert same(following, by_hand)
    assert following.distance().distance > 0  # the control: it is an average


def test_the_handlers_ema_follows_sam_too() -> None:
    pytest.importorskip("ignite")
    from ema_triton import EMAHandler

    model = network()
    sam = SAM(model.parameters(), Adam, lr=0.1)
    handler = EMAHandler(model)
    handler.ema.follow(sam, Constant(0.5))
    sam.step(closure_of(model, sam))
    assert handler.update_index == 1


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("base", [SGD, Adam])
def test_a_wrapped_step_is_followed_as_by_hand(wrap: str, base: type) -> None:
    """Also where the wrapper goes on changing the weights, as Lookahead does."""
    model = network()
    optimizer = WRAPPERS[wrap](base(model.parameters(), lr=0.1))
    following, by_hand = ModelEMA(model), ModelEMA(model)
    following.follow(optimizer, WARMUP)
    for count in range(1, 7):
        closure_of(model, optimizer)()
        optimizer.step()
        by_hand.update(WARMUP(count))
        assert following.update_index == count
        assert same(following, by_hand)


def test_that_comparison_can_fail() -> None:
    """Lookahead's slow weights come after the step of the optimizer inside."""
    model = network()
    inner = SGD(model.parameters(), lr=0.1)
    optimizer = Lookahead(inner)
    following, by_hand = ModelEMA(model), ModelEMA(model)
    following.follow(inner, WARMUP)
    for count in (1, 2):
        closure_of(model, optimizer)()
        optimizer.step()
        by_hand.update(WARMUP(count))
    assert following.update_index == 2
    assert not same(following, by_hand)


class Clipped(SGD):
    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            torch._foreach_clamp_max_(group["params"], 0.1)


def test_a_step_that_calls_its_super_step_is_one_update() -> None:
    """Torch wraps both with the hooks as soon as there was an optimizer of either class."""
    model = network()
    SGD(model.parameters(), lr=0.1)
    optimizer, ema, called = Clipped(model.parameters(), lr=0.1), ModelEMA(model), []
    ema.follow(optimizer, Constant(0.5))
    optimizer.register_step_post_hook(lambda *_: called.append(True))
    by_hand = ModelEMA(model)
    for count in range(1, 4):
        closure_of(model, optimizer)()
        optimizer.step()
        by_hand.update(0.5)
        assert ema.update_index == count
        assert same(ema, by_hand)  # the update comes after the clipping
    assert len(called) == 6  # the control


def test_after_a_step_with_a_super_step_that_failed_an_update_waits_for_the_next_step() -> None:
    """An end of one step cannot be told from that of one inside the failed one."""
    model = network()
    SGD(model.parameters(), lr=0.1)
    optimizer, ema, by_hand = Clipped(model.parameters(), lr=0.1), ModelEMA(model), ModelEMA(model)
    ema.follow(optimizer, Constant(0.5))

    def fail() -> Tensor:
        raise ArithmeticError("out of memory")

    with pytest.raises(ArithmeticError):
        optimizer.step(fail)
    closure_of(model, optimizer)()
    for _ in range(3):
        optimizer.step()
        by_hand.update(0.5)
    assert same(ema, by_hand)


@pytest.mark.parametrize("wrap", [None, Lookahead, Plain])
def test_a_step_that_fails_is_no_update_and_the_next_one_is(wrap: Callable | None) -> None:
    model = network()
    optimizer: Any = SGD(model.parameters(), lr=0.1)
    optimizer = optimizer if wrap is None else wrap(optimizer)
    ema = ModelEMA(model)
    ema.follow(optimizer, Constant(0.5))

    def fail() -> Tensor:
        raise ArithmeticError("out of memory")

    for count in range(3):
        with pytest.raises(ArithmeticError):
            optimizer.step(fail)
        assert ema.update_index == count
        optimizer.step(closure_of(model, optimizer))
        assert ema.update_index == count + 1


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("wrap", [None, Lookahead, Plain])
def test_steps_that_grad_scaler_skips_inside_a_wrapper_do_not_count(
    wrap: Callable | None, fused: bool
) -> None:
    """With a fused optimizer inside, the scaler steps that one, as accelerate and Lightning do."""
    model = network()
    inner = Adam(model.parameters(), lr=0.1, fused=fused)
    ema = ModelEMA(model)
    ema.follow(inner if wrap is None else wrap(inner), Constant(0.5), every=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    steps = 0
    for overflow in (False, True, False, True, True, False, False, False):
        inner.zero_grad()
        scaler.scale(model(torch.randn(5, 3)).square().mean()).backward()
        if overflow:
            model[3].bias.grad.fill_(float("inf"))
        scaler.step(inner)
        scaler.update()
        steps += not overflow
        assert ema.update_index == steps // 2
    assert steps == 5


def test_accelerates_accumulation_makes_no_update() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
    model = network()
    prepared, optimizer = accelerator.prepare(model, SGD(model.parameters(), lr=0.1))
    ema = ModelEMA(prepared)
    ema.follow(optimizer, Constant(0.5))
    try:
        for batch in range(1, 8):
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(torch.randn(5, 3)).square().mean())
                optimizer.step()
                optimizer.zero_grad()
            assert ema.update_index == batch // 3
    finally:
        accelerate.state.GradientState._reset_state()


@pytest.mark.parametrize("wrap", [*WRAPPERS])
def test_remove_ends_it_on_every_level(wrap: str) -> None:
    model = network()
    optimizer = WRAPPERS[wrap](SGD(model.parameters(), lr=0.1))
    ema = ModelEMA(model)
    handle = ema.follow(optimizer, Constant(0.5))
    with pytest.raises(RuntimeError, match="follows an optimizer already"):
        ema.follow(optimizer, Constant(0.5))
    handle.remove()
    closure_of(model, optimizer)()
    optimizer.step()
    assert ema.update_index == 0
    levels = [optimizer]
    while inner := (
        getattr(levels[-1], "optimizer", None) or getattr(levels[-1], "_base_optimizer", None)
    ):
        levels.append(inner)
    for level in levels:
        assert not getattr(level, "_optimizer_step_pre_hooks", None)
        assert not getattr(level, "_optimizer_step_post_hooks", None)
    with ema.follow(optimizer, Constant(0.5)):
        optimizer.step()
    optimizer.step()
    assert ema.update_index == 1


class Twice(Lookahead):
    """Makes two steps of the optimizer inside."""

    def step(self, closure: Callable[[], Tensor]) -> None:
        self.optimizer.step(closure)
        super().step(closure)


def test_a_wrapper_that_makes_two_steps_makes_two_updates() -> None:
    model = network()
    optimizer, ema = Twice(SGD(model.parameters(), lr=0.1)), ModelEMA(model)
    ema.follow(optimizer, Constant(0.5))
    for count in range(1, 4):
        optimizer.step(closure_of(model, optimizer))
        assert ema.update_index == 2 * count


def test_a_step_of_sam_that_failed_halfway_hides_no_later_ones() -> None:
    model = network()
    sam, calls = SAM(model.parameters(), SGD, lr=0.1), []
    ema = ModelEMA(model)
    ema.follow(sam, Constant(0.5))

    def fail() -> Tensor:
        calls.append(True)
        if len(calls) == 2:
            raise ArithmeticError("out of memory")
        return closure_of(model, sam)()

    with pytest.raises(ArithmeticError):
        sam.step(fail)
    for _ in range(3):
        closure = closure_of(model, sam)
        closure()
        sam.first_step(zero_grad=True)
        closure()
        sam.second_step(zero_grad=True)
    assert ema.update_index == 3


class Uninitialized(Optimizer):
    """Computes its step by itself, and is no whole torch Optimizer."""

    def __init__(self, params: Any) -> None:
        self.param_groups = [{"params": [*params]}]
        self.state, self.optimizer = {}, None

    def step(self, closure: object = None) -> None: ...


class Several:
    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers

    def step(self) -> None: ...


class Recursive:
    def __init__(self) -> None:
        self.optimizer = self

    def step(self) -> None: ...


REFUSED: dict[str, Callable[[nn.Module], object]] = {
    "Several": lambda model: Several(SGD(model.parameters(), lr=0.1)),
    "Uninitialized": lambda model: Uninitialized(model.parameters()),
    "Uninitialized ": lambda model: Plain(Uninitialized(model.parameters())),
    "Recursive": lambda model: Recursive(),
    "list": lambda model: [SGD(model.parameters(), lr=0.1)],
    "Sequential": lambda model: model,
    "NoneType": lambda model: None,
    "type": lambda model: SGD,
    "method": lambda model: SGD(model.parameters(), lr=0.1).step,
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_followed_is_an_error_at_once(kind: str) -> None:
    model = network()
    ema = ModelEMA(model)
    with pytest.raises(TypeError) as caught:
        ema.follow(REFUSED[kind](model), Constant(0.5))  # type: ignore[arg-type]
    said = str(caught.value)
    assert f"of {kind.strip()} cannot be followed" in said.replace("a step of", "of")
    for part in ("torch.optim.Optimizer", "never be updated", "call update() after each step"):
        assert part in said
    assert ema.schedule is None
    ema.follow(SGD(model.parameters(), lr=0.1), Constant(0.5))  # nothing is left of it


def test_a_wrapper_whose_inner_optimizer_trains_copies_is_an_error() -> None:
    """As those that step fp32 copies of the weights, and write them to the model afterwards."""
    model = network()
    copies = [p.detach().clone().requires_grad_() for p in model.parameters()]
    ema = ModelEMA(model)
    with pytest.raises(ValueError, match="none of this model's parameters") as caught:
        ema.follow(Plain(SGD(copies, lr=0.1)), Constant(0.5))
    assert "SGD" in str(caught.value)
    assert "call update() after each step" in str(caught.value)
    assert ema.schedule is None
