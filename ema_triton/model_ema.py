"""`ModelEMA`: a model's EMA model, kept up to date one `update` at a time.

It knows no training loop and no schedule: it receives a momentum.
"""

from __future__ import annotations

import copy
import logging
import numbers
import sys
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ema_triton import reference, saved
from ema_triton.backend import Backend, check_name, choose
from ema_triton.pairs import check_tensors, clean_name, own_copy
from ema_triton.plan import Memory, Plan, make_plan
from ema_triton.precision import COMPANION_DTYPE, PRECISIONS

logger = logging.getLogger("ema_triton")

HANDLE_BUFFERS = ("copy", "update", "ema_train")
EMA_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class ModelEMA:
    r"""Exponential moving average of a model's weights, in one fused launch per update.

    .. math:: \theta_{EMA} \leftarrow (1 - \lambda)\,\theta_{EMA} + \lambda\,\theta

    computed as `torch.lerp` does, in fp32 (fp64 for fp64). Parameters are paired by name, tied
    ones averaged once, frozen ones too; integer and bool tensors are copied exactly. The online
    tensors are followed wherever they go: replaced, moved, cast, converted to another memory
    format. The EMA lives on their device and keeps its own dtype.

    The EMA model's weights are views into one flat buffer per dtype. `torch.save(ema.ema_model)`
    and `torch.save(ema.state_dict())` write each byte once; but saving the `state_dict()` of one
    of its sub-modules alone writes the whole buffer: save clones of its tensors instead.

    Args:
        model: The online model, on any device, of any floating or complex dtype. A
            `DistributedDataParallel` or `torch.compile` wrapper is taken off; `DataParallel` stays.
        ema_model: The EMA model to use, with the same parameter and buffer names and shapes and
            its own values. By default a copy of `model`.
        handle_buffers: "copy" copies the online buffers at every update, "update" averages the
            floating ones, "ema_train" leaves them to the EMA model, which is then in train mode.
        backend: "auto", "triton" or "foreach".
        ema_dtype: dtype of the EMA model's floating parameters and buffers, by default that of the
            online model.
        precision: How bf16 and fp16 EMA tensors take small steps. "exact" keeps what their dtype
            cannot hold beside them (2 bytes per bf16 parameter, 4 per fp16 one), so that they
            accumulate as an fp32 EMA does; "stochastic" rounds up or down by chance, right in the
            mean; "nearest" rounds to nearest as torch does, and stands still where the momentum is
            small. Wider dtypes need none of it.
        seed: Of the stochastic rounding, from 0 to 2**63 - 1; the same on all ranks keeps their
            EMAs equal.

    Attributes:
        model: The online model, unwrapped.
        ema_model: The EMA model, in eval mode unless `handle_buffers` is "ema_train".
        handle_buffers: As given.
        precision: As given.

    Raises:
        ValueError: An argument is not one of the accepted values; the model is not a Module; names
            or shapes of `model` and `ema_model` disagree; a tensor has no memory.
        TypeError: A tensor is of a kind that cannot be averaged.
        NotImplementedError: The model is sharded.
        RuntimeError: The model cannot be copied, or backend="triton" cannot run here.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> ema = ModelEMA(model)
        >>> _ = model.weight.data.fill_(1.0), ema.ema_model.weight.data.fill_(0.0)
        >>> ema.update(0.25)
        >>> ema.ema_model.weight
        Parameter containing:
        tensor([[0.2500, 0.2500]])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        ema_model: nn.Module | None = None,
        handle_buffers: str = "copy",
        backend: str = "auto",
        ema_dtype: torch.dtype | None = None,
        precision: str = "exact",
        seed: int = 0,
    ) -> None:
        _check_model(model)
        _check_choices(handle_buffers, ema_dtype, precision, seed)
        check_name(backend)
        self.model = unwrap(model)
        self.handle_buffers = handle_buffers
        self.precision = precision
        if ema_model is None:
            check_tensors(self.model)
            with torch.inference_mode(False):  # as in _make_plan
                self.ema_model = _copy(self.model)
        else:
            _check_model(ema_model)
            self.ema_model = unwrap(ema_model)
            if self.ema_model is self.model:
                raise ValueError(
                    "ema_model is the online model itself, so there is nothing to average. Give "
                    "another instance of it, or leave ema_model out to have a copy made."
                )
        self._requested_backend = backend
        self._plan: Plan | None = None
        self._backend: Backend | None = None
        self._captured: list[Plan] = []
        self._warned = False
        self._memory: Memory | None = Memory({}, seed, 0)
        self._make_plan(ema_dtype)
        self.ema_model.requires_grad_(False)
        self.ema_model.train(handle_buffers == "ema_train")

    @property
    def backend(self) -> str:
        """What runs: "triton" or "foreach"."""
        return self._chosen.name

    @property
    def backend_reason(self) -> str:
        """Why that backend was chosen, and what it leaves to the reference path."""
        return self._chosen.reason

    # A compiled training step calls this as it is: traced, every address would become a guard.
    # torch.compiler.disable does the same, but its import costs a second at start-up.
    @_disable_dynamo
    def update(self, momentum: float | Tensor) -> None:
        """Move the EMA towards the online model: ema = lerp(ema, online, momentum).

        Args:
            momentum: The weight of the online weights, in [0, 1]: a float, or a 0-d floating
                tensor. One on the model's device is read by the kernel, so that a captured CUDA
                graph follows its value (update once with it before the capture, to compile, and
                keep this object as long as the graph); nothing waits for the device.

        Raises:
            ValueError: The momentum is out of range, or a tensor changed its shape or vanished.
            RuntimeError: A tensor moved during CUDA graph capture.
        """
        momentum = _check_momentum(momentum)
        with torch.no_grad():
            plan, online = self._current_plan()
            self._check_momentum_fits(momentum, plan)
            if online:
                torch._foreach_copy_(plan.copies.ema, online)
            self._chosen.update(plan, momentum)
            if plan.on_cuda and torch.cuda.is_current_stream_capturing():
                self._captured.append(plan)  # the graph goes on reading its chunk table
            plan.wrote()

    @_disable_dynamo
    def sync(self) -> None:
        """Copy the online model into the EMA model, buffers too, e.g. after loading weights.

        Raises:
            ValueError: A tensor changed its shape or vanished.
        """
        with torch.no_grad():
            plan, online = self._current_plan()
            if online:
                torch._foreach_copy_(plan.copies.ema, online)
            for bucket in plan.buckets:
                reference.copy_bucket(bucket)
            for pair in plan.kept:
                current = pair.online_slots[0].read()
                if current is not None:
                    for slot in pair.ema_slots:
                        slot.owner[slot.key] = own_copy(current, pair.ema.dtype)
            plan.wrote()

    def state_dict(self) -> dict[str, Any]:
        """The EMA's state by clean name, for `torch.save`; tensors are shared, not copied.

        It holds the EMA model's weights, what an exact EMA keeps beside them ("companions"), and
        from where stochastic rounding goes on ("rounding", the seed and the count of updates).
        """
        # No key that users would name the whole by: Ignite's Checkpoint tells a state saved alone
        # from one among others by that name.
        weights = self.ema_model.state_dict()
        clean: Any = OrderedDict((clean_name(name), value) for name, value in weights.items())
        # The modules' versions, which nn.Module.load_state_dict looks for.
        metadata = getattr(weights, "_metadata", {})
        clean._metadata = {clean_name(name): value for name, value in metadata.items()}
        plan = self._plan or self._make_plan()
        rounding = {"seed": plan.seed, "updates": plan.updates}
        beside = {id(pair): companion for pair, _, companion in plan.companions.current()}
        exact = plan.companions.names(clean)
        return {
            "version": saved.VERSION,
            "weights": clean,
            "precision": self.precision,
            "companions": {
                name: beside[id(pair)] for name, pair in exact.items() if id(pair) in beside
            },
            "rounding": rounding if self.precision == "stochastic" else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned, or a module's state dict, and go on from there.

        Values are converted to this EMA's dtypes and precision. A warning says what had to be
        rounded, and what the state does not tell.

        Raises:
            ValueError: The state is not of this kind or version, or names or shapes do not fit.
                Nothing has been loaded then.
        """
        found = saved.Saved.of(state)
        plan, _ = self._current_plan()
        own_state = self.ema_model.state_dict()
        names = {clean_name(name): name for name in own_state}
        own = dict(zip(names, own_state.values(), strict=True))
        found.check_fit(own)
        exact = {name: pair.name for name, pair in plan.companions.names(own).items()}
        weights, values, remarks = found.converted(own, exact)
        loaded: Any = OrderedDict((names[name], value) for name, value in weights.items())
        loaded._metadata = getattr(found.weights, "_metadata", None)
        self.ema_model.load_state_dict(loaded)
        seed, updates = plan.seed, plan.updates
        if self.precision == "stochastic":
            if found.precision == "stochastic":
                seed, updates = found.seed, found.updates
            elif found.precision is None:
                remarks.append(
                    "a module's state dict does not tell from where stochastic rounding goes on, "
                    f"which keeps its seed {seed} and its count of {updates} updates"
                )
        self._memory = Memory(values, seed, updates)
        self._make_plan()
        if remarks:
            warnings.warn(f"The state was loaded; but {'; '.join(remarks)}.", stacklevel=2)

    def __getstate__(self) -> dict[str, Any]:
        """Without the plan: its addresses mean nothing to a copy or to another process."""
        memory = self._memory if self._plan is None else self._plan.memory()
        return {
            **self.__dict__,
            "_plan": None,
            "_backend": None,
            "_captured": [],
            "_memory": memory,
        }

    @property
    def _chosen(self) -> Backend:
        if self._backend is None:  # unpickled, or a copy
            self._make_plan()
        assert self._backend is not None
        return self._backend

    def _current_plan(self) -> tuple[Plan, list[Tensor]]:
        """A plan that is not stale, and the online tensors that it copies."""
        plan = self._plan
        if plan is not None and self._backend is not None and not plan.is_stale():
            online = plan.copies.read()
            if online is not None:
                return plan, online
        plan = self._make_plan()
        online = plan.copies.read()
        assert online is not None  # just planned
        return plan, online

    def _make_plan(self, ema_dtype: torch.dtype | None = None) -> Plan:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "A CUDA graph is being captured, and the EMA is not ready for it: it is new, or a "
                "tensor of the online or the EMA model moved since the last update, and the graph "
                "would keep old addresses, or an exact EMA was written. Call update() once after "
                "the last change of the models, then capture."
            )
        # Tensors made in inference mode could never be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            plan = make_plan(
                self.model,
                self.ema_model,
                self.handle_buffers,
                ema_dtype=ema_dtype,
                precision=self.precision,
                previous=self._plan,
                memory=self._memory,
            )
            for bucket in self._plan.buckets if self._plan else ():
                # A launch on another stream may still be reading the old chunk table.
                if bucket.key.device.type == "cuda":
                    torch.cuda.synchronize(bucket.key.device)
            # The tensors lie as the plan says, whether or not a backend can be found for it.
            last, self._backend = self._backend, None
            self._plan, self._memory = plan, None
            self._backend = choose(self._requested_backend, plan)
        if last is None or last.reason != self._backend.reason:
            logger.info("EMA backend: %s (%s)", self._backend.name, self._backend.reason)
        return plan

    def _check_momentum_fits(self, momentum: float | Tensor, plan: Plan) -> None:
        for bucket in plan.buckets:
            if isinstance(momentum, Tensor):
                if momentum.device != bucket.key.device:
                    raise ValueError(
                        f"The momentum is a tensor on {momentum.device}, but '{bucket.names[0]}' "
                        f"is on {bucket.key.device}, where using it would wait for the device. "
                        "Give a float, or a tensor on the model's only device."
                    )
            elif (
                not self._warned
                and self.precision == "nearest"
                and bucket.key.ema_dtype in COMPANION_DTYPE
            ):
                resolution = torch.finfo(bucket.key.ema_dtype).eps
                if 0 < momentum < resolution:
                    self._warned = True
                    warnings.warn(
                        f"momentum {momentum:g} is below the resolution of {bucket.key.ema_dtype} "
                        f"({resolution:g}): most updates of the EMA round away, and it stands "
                        "still. precision='exact', the default, keeps what precision='nearest' "
                        "rounds away.",
                        stacklevel=5,  # past the two frames of _disable_dynamo
                    )


def unwrap(model: nn.Module) -> nn.Module:
    """Take off DistributedDataParallel and torch.compile wrappers, however nested."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy with torch.compile wrappers taken off, inside too, so that names are clean."""
    memo: dict[int, Any] = {}
    try:
        for module in reversed([*model.modules()]):  # inner ones first
            if isinstance(compiled := getattr(module, "_orig_mod", None), nn.Module):
                memo[id(module)] = copy.deepcopy(compiled, memo)
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise RuntimeError(
            f"The model cannot be copied to make an EMA model ({error}). Often a tensor that was "
            "computed, and not a parameter, is an attribute of a module (after a forward pass, by "
            "pruning, by the old weight_norm): build the EMA before, or give ModelEMA an "
            "ema_model, another instance of the model."
        ) from error


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(
            "model should be an instance of nn.Module or its subclasses, but got "
            f"{type(model).__name__}. Pass the model whose weights are to be averaged."
        )
    # Whoever has such a model has imported this.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for name, module in model.named_modules():
        which = f"module {name!r}" if name else "the model"
        if fsdp and isinstance(module, (fsdp.FullyShardedDataParallel, fsdp.FSDPModule)):
            raise NotImplementedError(
                f"{which} is sharded by FSDP, and averaging shards is not supported yet. Use "
                "DistributedDataParallel, or build the EMA of the unsharded model."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise NotImplementedError(
                f"{which} is a TorchScript module, which keeps its tensors out of Python's reach. "
                "Build the EMA of the Python module, and script its ema_model if need be."
            )


def _check_choices(
    handle_buffers: object, ema_dtype: object, precision: object, seed: object
) -> None:
    if handle_buffers not in HANDLE_BUFFERS:
        raise ValueError(
            "handle_buffers can only be one of 'copy', 'update', 'ema_train', but got "
            f"{handle_buffers!r}. 'copy' copies the online buffers, 'update' averages them, "
            "'ema_train' leaves them to the EMA model in train mode."
        )
    if ema_dtype is not None and ema_dtype not in EMA_DTYPES:
        raise ValueError(
            f"ema_dtype must be None or one of {', '.join(map(str, EMA_DTYPES))}, but got "
            f"{ema_dtype!r}. It is the dtype of the EMA model's floating tensors."
        )
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision must be one of {', '.join(map(repr, PRECISIONS))}, but got {precision!r}. "
            "It says how a bf16 or fp16 EMA takes steps smaller than its dtype's: 'exact' keeps "
            "the rest beside the weights, 'stochastic' rounds by chance, 'nearest' drops it."
        )
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(
            f"seed must be an int from 0 to 2**63 - 1, but got {seed!r}. Stochastic rounding draws "
            "its random numbers from it."
        )


def _check_momentum(momentum: object) -> float | Tensor:
    if isinstance(momentum, Tensor):
        if momentum.dim() != 0 or not momentum.is_floating_point():
            raise ValueError(
                f"Invalid momentum: a {momentum.dtype} tensor of shape {tuple(momentum.shape)}. "
                "It weighs all tensors alike: give a float, or a 0-d floating tensor."
            )
        if momentum.device.type != "cpu":
            return momentum
    elif not isinstance(momentum, numbers.Real) or isinstance(momentum, bool):
        raise TypeError(
            f"Invalid momentum: {momentum!r}. It is the weight of the online weights: give a float "
            "in [0, 1], or a 0-d floating tensor."
        )
    value = float(momentum)
    if not 0 <= value <= 1:
        raise ValueError(
            f"Invalid momentum: {value}. It is the weight of the online weights (1 - decay), and "
            "outside [0, 1] the EMA diverges. Give a value in [0, 1]."
        )
    return value
