"""`ModelEMA`: a model's EMA model, kept up to date one `update` at a time.

It knows no training loop. It receives a momentum, or follows an optimizer and a schedule.
"""

from __future__ import annotations

import copy
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ema_triton import arguments, distance
from ema_triton.checkpoint import copy_to, interop, state_dict
from ema_triton.checkpoint.state_dict import SavedState, build, read_weights, scatter_state
from ema_triton.distributed import collectives
from ema_triton.following import Following
from ema_triton.interrupts import DeferSigint, SwapContext
from ema_triton.modules import are_sharded, check_model, set_apart, slots_of, unwrap
from ema_triton.ops import foreach_backend
from ema_triton.pairing import check_online
from ema_triton.plan import Launch
from ema_triton.planner import Planner
from ema_triton.schedules import Schedule, check_schedule
from ema_triton.selection import Selection
from ema_triton.state import EMAState
from ema_triton.swap import Swap, refuse_inside


class ModelEMA:
    """Exponential moving average of a model's weights, in one fused launch per update.

        ema = (1 - momentum) * ema + momentum * online

    computed as `torch.lerp` does, in fp32 (fp64 for fp64). Parameters are paired by name, tied
    ones averaged once, frozen ones too; integer and bool tensors are copied exactly. The online
    tensors are followed wherever they go: replaced, moved, cast, converted to another memory
    format. The EMA lives on their device and keeps its own dtype.

    The EMA's tensors lie side by side in one buffer per dtype, each with a storage of its own, so
    that any tool saves them as those of any other model. (On CUDA, send clones of them to other
    processes: CUDA shares whole allocations.)

    Args:
        model: The online model, on any device, of any floating or complex dtype. A
            `DistributedDataParallel` or `torch.compile` wrapper is taken off; `DataParallel` stays.
            Of a `DistributedDataParallel` model each rank's EMA has its own rank's buffers. Of a
            sharded one (FSDP2, any `DTensor`) each rank averages its own parts; build this on
            every rank, after sharding.
        ema_model: The EMA model to use, with the same parameter and buffer names and shapes and
            its own values, and sharded likewise. By default a copy of `model`; of a sharded one
            there is none. What `include` and `exclude` leave out may be shared with `model`: it is
            not held twice, nor saved, and its modules stay in the mode in which they are.
        as_module: Whether to make a copy of the module around the EMA's tensors. Without, there is
            no `ema_model`: evaluate the online model in `swapped()`. What `include` and `exclude`
            leave out is not held then, nor saved, nor looked at: it may be of any kind.
        handle_buffers: "copy" copies the online buffers at every update, "update" averages the
            floating ones, "ema_train" leaves them to the EMA model, which is then in train mode.
            "update" copies spectral norm's unit vectors and pruning's masks all the same, whose
            averages would be neither; name other buffers that are no running statistics in
            `exclude`. What is copied may change its shape, appear and vanish; a non-persistent
            buffer of which the models have different shapes is each model's own.
        backend: "auto", "triton" or "foreach".
        ema_dtype: dtype of the EMA's floating parameters and buffers, by default the online ones'.
        precision: How bf16 and fp16 EMA tensors take small steps. "exact" keeps what their dtype
            cannot hold beside them (2 bytes per bf16 parameter, 4 per fp16 one), so that they
            accumulate as an fp32 EMA does; "stochastic" rounds up or down by chance, right in the
            mean; "nearest" rounds to nearest as torch does, and stands still where the momentum is
            small. Wider dtypes need none of it.
        seed: Of the stochastic rounding, from 0 to 2**63 - 1; the same on all ranks keeps their
            EMAs equal.
        include: Names or globs of the tensors or modules to average, by default all; the rest is
            held twice and copied at every update, unless as_module=False or `ema_model` shares it.
        exclude: Those of `include` to copy all the same.
        momentum_scale: Factors for the momentum by name or glob, of which the first that matches a
            tensor counts; a product above 1 is 1, and a momentum of 1 copies whatever the factor.
        nonfinite: What an online value of NaN or Inf does to the EMA, or one too large for its
            dtype: "propagate" lets it in, as torch does; "skip" keeps the EMA's old value there
            and counts, see `nonfinite_counts`. Of what is averaged; a copy is a copy.

    Raises:
        ValueError: An argument is not one of the accepted values; the model is not a Module; names
            or shapes of `model` and `ema_model` disagree; a tensor has no memory.
        TypeError: A tensor is of a kind that cannot be averaged.
        NotImplementedError: The model is sharded by FSDP1 or DeepSpeed's ZeRO-3.
        RuntimeError: The model cannot be copied, or backend="triton" cannot run here.

    Examples:
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
        as_module: bool = True,
        handle_buffers: str = "copy",
        backend: str = "auto",
        ema_dtype: torch.dtype | None = None,
        precision: str = "exact",
        seed: int = 0,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        momentum_scale: Mapping[str, float] | None = None,
        nonfinite: str = "propagate",
    ) -> None:
        check_model(model)
        arguments.check_choices(
            seed,
            handle_buffers=handle_buffers,
            backend=backend,
            ema_dtype=ema_dtype,
            precision=precision,
            nonfinite=nonfinite,
        )
        self._model = unwrap(model)
        self.handle_buffers = handle_buffers
        self.precision = precision
        self.nonfinite = nonfinite
        selection = Selection.of(include, exclude, momentum_scale)
        self._following: Following | None = None
        self._swap: Swap | None = None
        self._lock = threading.RLock()
        self._warned = False
        self._name_in_bank: str | None = None
        module = arguments.check_holder(self.model, ema_model, as_module, handle_buffers)
        online = slots_of(self.model)
        excluded = check_online(online, module, selection, handle_buffers, as_module=as_module)
        self._state = EMAState(
            module,
            handle_buffers=handle_buffers,
            selection=selection,
            left_out=() if as_module else excluded,
            precision=precision,
            seed=seed,
            guarded=nonfinite == "skip",
        )
        if ema_model is None:
            self._state.build(self.model, online, ema_dtype, as_module=as_module)
        self._planner = Planner(self.model, [self._state], backend)
        self._planner.make(online, ema_dtype)
        if self._state.module is not None:
            set_apart(self._state.module, self.model, training=handle_buffers == "ema_train")

    @property
    def model(self) -> nn.Module:
        """The online model, unwrapped."""
        return self._model

    @model.setter
    def model(self, _: nn.Module) -> NoReturn:
        raise AttributeError(
            "The online model cannot be assigned: its tensors are paired with the EMA's. Load "
            "other weights into it and call sync(), or build a new ModelEMA (or EMAHandler)."
        )

    @property
    def ema_model(self) -> nn.Module:
        """The EMA model, in eval mode unless `handle_buffers` is "ema_train".

        Raises:
            RuntimeError: There is none: with as_module=False, and of a sharded model.
        """
        return arguments.check_has_module(self._state.module, self._state.slots())

    @property
    def update_index(self) -> int:
        """The number of updates made; replays of a captured CUDA graph are not seen."""
        return self._state.update_index

    @update_index.setter
    def update_index(self, index: int) -> None:
        self._state.update_index = index

    @property
    def backend(self) -> str:
        """What runs: "triton" or "foreach"."""
        return self._planner.latest().backend

    @property
    def backend_reason(self) -> str:
        """Why that backend was chosen, and what the foreach backend does instead."""
        return self._planner.latest().reason

    # A compiled training step calls this as it is: traced, every address would become a guard.
    # torch.compiler.disable does the same, but its import costs a second at start-up.
    @_disable_dynamo
    def update(self, momentum: float | Tensor) -> None:
        """Move the EMA towards the online model: ema = lerp(ema, online, momentum).

        Args:
            momentum: The weight of the online weights, in [0, 1]: a float, or a 0-d floating
                tensor. One on the model's device is read by the kernel, so that a captured CUDA
                graph follows its value (update once with it before the capture, and keep this
                object as long as the graph); nothing waits for the device. 1 copies.

        Raises:
            ValueError: The momentum is out of range; an averaged tensor was reshaped or vanished.
            RuntimeError: A tensor moved during CUDA graph capture; the models' weights are swapped.
        """
        momentum = arguments.check_momentum(momentum)
        arguments.refuse_in_bank(self._name_in_bank, "update()")
        with self._lock, torch.no_grad():
            plan, online = self._planner.outside_swap(self._swap, "update()")
            self._check_fits(momentum, plan.launches)
            self._planner.update(plan, online, momentum)

    @_disable_dynamo
    def sync(self) -> None:
        """Copy the online model into the EMA model, buffers too, e.g. after loading weights.

        SIGINT (Ctrl-C) is deferred meanwhile.

        Raises:
            ValueError: A tensor changed its shape or vanished.
            RuntimeError: The models' weights are swapped.
        """
        with self._lock, DeferSigint(), torch.no_grad():
            foreach_backend.sync(*self._planner.outside_swap(self._swap, "sync()"))
            self._planner.record("sync")

    def copy_to(self, model: nn.Module) -> None:
        """Copy the EMA's parameters and persistent buffers into a model's tensors.

        For example another instance's when the training ends, or the online model's to train on
        from the EMA. Their dtypes and devices stay. What the EMA does not hold is copied from the
        online model. All is compared before anything is copied, and SIGINT is deferred meanwhile.

        Args:
            model: A model with the online model's names and shapes, and sharded likewise if that
                is. A `DistributedDataParallel` or `torch.compile` wrapper is taken off.

        Raises:
            ValueError: Names, shapes or kinds of tensors do not fit. Nothing has been copied then.
            RuntimeError: The models' weights are swapped.

        Examples:
            >>> model, ema = torch.nn.Linear(2, 1), ModelEMA(torch.nn.Linear(2, 1))
            >>> ema.copy_to(model)
            >>> torch.equal(model.weight, ema.ema_model.weight)
            True
        """
        with self._lock, DeferSigint(), torch.no_grad():
            self._planner.outside_swap(self._swap, "copy_to()")
            copy_to.copy_to(self._state, self.model, model)

    def swapped(self) -> AbstractContextManager[nn.Module]:
        """A context in which the online model has the EMA's weights and buffers, to be evaluated.

        The values change places, at unchanged addresses: one pass on a GPU, on a CPU with at most a
        chunk of extra memory. (Where EMA and online dtypes differ, and for what is copied and not
        averaged, the online values wait in a copy.) They are back after any exception, also that
        of SIGINT (Ctrl-C), which is deferred while they move. Inside, `update`, `sync`,
        `load_state_dict` and another swap are errors, `state_dict` is what it is outside, and a
        write to the weights is warned of on exit. What is written into buffers is lost, with a
        warning where it was in train mode: estimate BatchNorm's statistics in `ema_model`
        (`torch.optim.swa_utils.update_bn`). With "copy" the next update overwrites them.

        Raises:
            RuntimeError: They are swapped already.

        Examples:
            >>> model = torch.nn.Linear(2, 1)
            >>> ema = ModelEMA(model)
            >>> _ = ema.ema_model.weight.data.fill_(0.5)
            >>> with ema.swapped() as evaluated:
            ...     print(evaluated is model, model.weight.tolist())
            True [[0.5, 0.5]]
        """
        return SwapContext(self.swap_in, self.swap_out)

    def swap_in(self) -> nn.Module:
        """Begin what `swapped` does, up to `swap_out`, for separate hooks; the online model.

        Raises:
            RuntimeError: They are swapped already.
        """
        with self._lock, torch.no_grad():
            plan, _ = self._planner.outside_swap(self._swap, "swapped()")
            self._swap = Swap(self.model, self._state.module, plan).enter()
            return self.model

    def swap_out(self) -> None:
        """End it; without effect where nothing is swapped."""
        with self._lock:
            swap, self._swap = self._swap, None
            if swap is not None:
                swap.leave()

    def follow(self, optimizer: object, schedule: Schedule, *, every: int = 1) -> Following:
        """Update after every step that the optimizer really makes, or after every n-th.

        Accumulating gradients makes no step, nor does `GradScaler` where gradients overflowed: a
        fused optimizer is asked whether it stepped, which waits for the device.

        Args:
            optimizer: The optimizer of the online model. Of a wrapper (SAM, Lookahead, those of
                accelerate, Lightning and apex), the steps of the optimizer inside count. Where the
                wrapper's `step` calls hooks too, as a torch optimizer's, the update comes after it.
            schedule: From the update index, counting from 1, to the momentum; also in `schedule`.
            every: Update after every n-th step, counting from this call, also in a resumed run. A
                half-life stays one in steps with `HalfLife(half_life, every)`.

        Returns:
            A handle whose `remove()` ends it.

        Raises:
            RuntimeError: It follows an optimizer already.
            ValueError: The optimizer has none of the model's parameters, or `every` is below 1.
            TypeError: The schedule is not a function, the optimizer's steps cannot be noticed, or
                `every` is not an integer.

        Examples:
            >>> model = torch.nn.Linear(2, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> ema = ModelEMA(model)
            >>> handle = ema.follow(optimizer, lambda update_index: 0.1)
            >>> model(torch.ones(2)).backward()
            >>> optimizer.step()
            >>> ema.update_index
            1
        """
        check_schedule(schedule)
        arguments.refuse_in_bank(self._name_in_bank, "follow()")
        update = lambda: self.update(self.next_momentum())  # noqa: E731
        self._following = Following(optimizer, self.model, update, every, self._following)
        self._state.schedule = schedule
        return self._following

    @property
    def schedule(self) -> Schedule | None:
        """The function from the update index to the momentum, if there is one; may be assigned."""
        return self._state.schedule

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        check_schedule(schedule)
        self._state.schedule = schedule

    def next_momentum(self) -> float:
        """The schedule's momentum for the next update."""
        return self._state.next_momentum()

    def nonfinite_count(self) -> int:
        """How many values were skipped so far, in all tensors: the sum of `nonfinite_counts`."""
        return sum(self.nonfinite_counts().values())

    def nonfinite_counts(self) -> dict[str, int]:
        """How many values of each averaged tensor were skipped so far; waits for the device.

        A value that is not finite in the online model counts at each update. A complex number has
        two values. Of a sharded tensor, those of this rank's part count.

        Returns:
            Skip counts by clean name, of a tied tensor by the first of its names, zeros included.

        Raises:
            RuntimeError: With nonfinite="propagate" nothing is counted.

        Examples:
            >>> model = torch.nn.Linear(2, 1)
            >>> ema = ModelEMA(model, nonfinite="skip")
            >>> _ = model.weight.data.fill_(float("nan"))
            >>> ema.update(0.1)
            >>> ema.nonfinite_counts()
            {'weight': 2, 'bias': 0}
        """
        if self.nonfinite == "propagate":
            raise RuntimeError(
                "nonfinite='propagate' counts nothing. Build the EMA with nonfinite='skip'."
            )
        with self._lock:
            return self._state.skip_counts()

    def distance(self) -> distance.Distance:
        """How far the EMA is from the online model, overall and by top-level module.

            distance, norm = ‖ema - online‖₂, ‖online‖₂

        over the averaged tensors, in fp64, of the values that an exact EMA accumulates, in
        memory that does not grow with the model. Waits for the device, and of a sharded model for
        the other ranks, which have to call it too.

        Raises:
            ValueError: A tensor changed its shape or vanished.
            RuntimeError: The models' weights are swapped.

        Examples:
            >>> model = torch.nn.Linear(2, 1, bias=False)
            >>> _ = model.weight.data.fill_(3.0)
            >>> ema = ModelEMA(model)
            >>> _ = ema.ema_model.weight.data.copy_(torch.tensor([[3.0, -1.0]]))
            >>> ema.distance().distance
            4.0
        """
        with self._lock, torch.no_grad():
            plan, _ = self._planner.outside_swap(self._swap, "distance()")
            return distance.measure(plan.averaged, plan.launches)

    def state_dict(self, *, clone: bool = False, full_state_dict: bool = False) -> dict[str, Any]:
        """The EMA's state by clean name, for `torch.save` or `torch.distributed.checkpoint`.

        Of a sharded model the tensors are `DTensor`s, which `torch.distributed.checkpoint` saves
        from, and loads onto, any number of ranks. It holds the update index, the schedule (as
        JSON; None for a function that is not one of `ema_triton.schedules`), the EMA model's
        parameters and persistent buffers ("weights"), what an exact EMA keeps beside them
        ("residuals"), and from where stochastic rounding goes on ("random_state"). No hooks are
        called, and no extra state is in it: `ema_model.state_dict()` has that.

        Args:
            clone: Whether to copy the tensors. They are shared otherwise, as those of a module's
                state dict: a thread that saves them while another one updates needs copies.
            full_state_dict: Whether to gather whole tensors on rank 0, on its CPU; the other ranks,
                which all have to call this, get an empty dict.
        """
        with self._lock, torch.no_grad():
            self._planner.reshard()
            weights = self._state.tensors()
            shown = weights if self._swap is None else self._swap.ema_weights(weights)
            return build(self._state, shown, clone=clone, full_state_dict=full_state_dict)

    def load_state_dict(
        self, state: Mapping[str, Any] | None, *, full_state_dict: bool = False, strict: bool = True
    ) -> None:
        """Load what `state_dict` returned, or a module's state dict, and go on from there.

        Values are converted to this EMA's dtypes and precision. A warning says what had to be
        rounded, and what the state does not tell; and where its schedule replaces another one. Of a
        sharded model, each rank takes its part of a tensor that is not sharded. All is compared
        before anything is loaded, and SIGINT (Ctrl-C) is deferred while it is.

        Args:
            state: The state.
            full_state_dict: Whether rank 0 alone has it, with whole tensors. All ranks have to call
                this; the state given on ranks other than 0 is ignored.
            strict: Whether names must match. If not, what the state has is loaded and the rest
                stays, residuals too; a warning names it, and what this EMA does not have.

        Raises:
            ValueError: The state is not of this kind or version, names or shapes do not fit, or
                a sharded tensor is another rank's part. Nothing has been loaded then.
            RuntimeError: The models' weights are swapped.
        """
        what = "load_state_dict()"
        if full_state_dict:
            with self._lock, torch.no_grad():
                refuse_inside(self._swap, what)
                self._planner.reshard()
                self._load(scatter_state(state, self._state, strict=strict), what)
        else:
            self._load(SavedState.parse(state, strict=strict), what)

    def save_weights(self, path: str | os.PathLike[str]) -> None:
        """Write the EMA model's weights, as it shows them, to a safetensors file.

        For others to use; to go on training save `state_dict`, which has more. An old file is
        replaced only once the new one is complete. The update index is in its metadata. Of a
        sharded model all ranks have to call this, and rank 0 writes whole tensors.

        Args:
            path: The file.

        Raises:
            ValueError: A tensor is of a kind that safetensors cannot hold. Nothing was written.
            ImportError: safetensors is not installed.
        """
        with self._lock:
            full = are_sharded(self._state.slots())
            weights = self.state_dict(full_state_dict=full).get("weights", {})
            write = partial(interop.write_safetensors, path, weights, self.update_index)
            collectives.on_rank0(write) if full else write()

    def load_weights(
        self, source: Mapping[str, Any] | str | os.PathLike[str], *, strict: bool = True
    ) -> None:
        """Load the weights that this or another library saved, and go on from there.

        Recognised are a module's state dict (Ignite, PyTorch) in any nesting of `module.` and
        `_orig_mod.`, `torch.optim.swa_utils.AveragedModel`, timm's checkpoints and `ModelEmaV3`,
        ema-pytorch's `EMA`, diffusers' `EMAModel`, and what `state_dict` and `save_weights` made.
        The update index and the schedule stay; a warning says what another library's state counts.

        Args:
            source: A dict; a file of safetensors or `torch.save`, told by its content; or a folder
                of `save_pretrained`, e.g. of diffusers' `EMAModel`.
            strict: Whether names must match; see `load_state_dict`.

        Raises:
            ValueError: It is none of these, or damaged, or names or shapes do not fit. Nothing has
                been loaded then.
            OSError: A file cannot be opened.
            RuntimeError: The models' weights are swapped.

        Examples:
            >>> model = torch.nn.Linear(2, 1)
            >>> averaged = torch.optim.swa_utils.AveragedModel(model)
            >>> ema = ModelEMA(model)
            >>> ema.load_weights(averaged.state_dict())
        """
        self._load(read_weights(source, self._state, strict=strict), "load_weights()")

    def _load(self, found: SavedState, what: str) -> None:
        """Load it, and warn of what was lost."""
        with self._lock, torch.no_grad():
            refuse_inside(self._swap, what)
            self._planner.current()  # replaced tensors are in the state's buckets again
            with DeferSigint():
                said = state_dict.restore(found, self._state)
                self._planner.plan.wrote()
                self._planner.record(what)
        for remark in said:
            warnings.warn(remark, UserWarning, stacklevel=3)

    def __getstate__(self) -> dict[str, Any]:
        """Without the optimizer it follows and the bank it is in, which a copy does not share."""
        with self._lock:
            refuse_inside(self._swap, "copying or pickling the EMA")
            return {**self.__dict__, "_following": None, "_name_in_bank": None, "_lock": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelEMA:
        """Copy it as a whole, while no other thread updates."""
        with self._lock:
            twin = memo[id(self)] = type(self).__new__(type(self))
            twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
            return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    def _check_fits(self, momentum: float | Tensor, launches: Sequence[Launch]) -> None:
        """Warn once if most of the updates would round away."""
        asks = not self._warned or isinstance(momentum, Tensor)
        if asks and (remark := arguments.check_momentum_fits(momentum, launches)):
            self._warned = True
            warnings.warn(remark, stacklevel=5)  # past the two frames of _disable_dynamo
