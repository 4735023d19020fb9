"""`ModelEMA`: a model's EMA model, kept up to date one `update` at a time.

It knows no training loop. It receives a momentum, or follows an optimizer and a schedule.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils.hooks import RemovableHandle

from ema_triton import distance, files, ranks, reference, shards
from ema_triton.arguments import check_choices, check_momentum
from ema_triton.backend import Backend, check_name, choose
from ema_triton.distance import Distance
from ema_triton.groups import Groups
from ema_triton.interrupts import Deferred, SwapContext
from ema_triton.loading import load, spread_from_first, weights_from
from ema_triton.models import Shell, check_model, copy_model, is_sharded, unwrap
from ema_triton.pairs import (
    Slots,
    check_tensors,
    has_fractions,
    own_copy,
    persistent_tensors,
)
from ema_triton.plan import Memory, Plan, make_plan
from ema_triton.precision import RESIDUAL_DTYPE
from ema_triton.saved import VERSION, Saved
from ema_triton.schedules import Schedule, check_schedule, momentum_from, schedule_to_state
from ema_triton.swap import Swap

logger = logging.getLogger("ema_triton")


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
            Of a `DistributedDataParallel` model each rank's EMA has its own rank's buffers. Of a
            sharded one (FSDP2, any `DTensor`) each rank averages its own parts; build this on
            every rank, after sharding.
        ema_model: The EMA model to use, with the same parameter and buffer names and shapes and
            its own values, and sharded likewise. By default a copy of `model`; of a sharded one
            there is none.
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
        include: Names or globs of the tensors or modules to average, by default all; what else
            there is gets copied at every update.
        exclude: Those of `include` to copy all the same.
        momentum_scale: Factors for the momentum by name or glob, of which the first that matches a
            tensor counts; a product above 1 is 1, and a momentum of 1 copies whatever the factor.
        nonfinite: What an online value of NaN or Inf does to the EMA, or one too large for its
            dtype: "propagate" lets it in, as torch does; "skip" keeps the EMA's old value there
            and counts, see `nonfinite_counts`. Of what is averaged; a copy is a copy.

    Attributes:
        model: The online model, unwrapped.
        handle_buffers: As given.
        precision: As given.
        nonfinite: As given.
        update_index: The number of updates made. (Replays of a captured CUDA graph are not seen.)

    Raises:
        ValueError: An argument is not one of the accepted values; the model is not a Module; names
            or shapes of `model` and `ema_model` disagree; a tensor has no memory.
        TypeError: A tensor is of a kind that cannot be averaged.
        NotImplementedError: The model is sharded by FSDP1 or DeepSpeed's ZeRO-3.
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
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        momentum_scale: Mapping[str, float] | None = None,
        nonfinite: str = "propagate",
    ) -> None:
        check_model(model)
        check_choices(handle_buffers, ema_dtype, precision, seed, nonfinite)
        check_name(backend)
        self.model = unwrap(model)
        self.handle_buffers = handle_buffers
        self.precision = precision
        self.nonfinite = nonfinite
        self.update_index = 0
        self._groups = Groups.of(include, exclude, momentum_scale)
        check_tensors(self.model)
        slots = Slots.of(self.model)
        averaged = slots.parameters | (slots.buffers if handle_buffers == "update" else {})
        self._groups.check(
            [*slots.parameters, *slots.buffers, *slots.empty_buffers],
            [
                name
                for name, slot in averaged.items()
                if (tensor := slot.read()) is not None and has_fractions(tensor)
            ],
        )
        if ema_model is None:
            with torch.inference_mode(False):  # as in _make_plan
                copied = Shell.of if is_sharded(self.model) else copy_model
                self._ema_model = copied(self.model)
        else:
            check_model(ema_model)
            self._ema_model = unwrap(ema_model)
            if self._ema_model is self.model:
                raise ValueError(
                    "ema_model is the online model itself, so there is nothing to average. Give "
                    "another instance of it, or leave ema_model out to have a copy made."
                )
        self._schedule: Schedule | None = None
        self._following: RemovableHandle | None = None
        self._swap: Swap | None = None
        self._lock = threading.RLock()
        self._requested_backend = backend
        self._plan: Plan | None = None
        self._backend: Backend | None = None
        self._captured: list[Plan] = []
        self._warned = False
        self._memory: Memory | None = Memory({}, seed, 0, {})
        self._make_plan(ema_dtype)
        self._ema_model.requires_grad_(False)
        self._ema_model.train(handle_buffers == "ema_train")

    @property
    def ema_model(self) -> nn.Module:
        """The EMA model, in eval mode unless `handle_buffers` is "ema_train".

        Raises:
            RuntimeError: The model is sharded, and none was given.
        """
        if isinstance(self._ema_model, Shell):
            raise RuntimeError(
                "The model is sharded, so that its EMA is kept in parts and there is no ema_model. "
                "Evaluate the online model with the EMA's weights (with ema.swapped() as model: "
                "...), or give an ema_model that is sharded likewise."
            )
        return self._ema_model

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
                graph follows its value (update once with it before the capture, and keep this
                object as long as the graph); nothing waits for the device. 1 copies.

        Raises:
            ValueError: The momentum is out of range, or a tensor changed its shape or vanished.
            RuntimeError: A tensor moved during CUDA graph capture; or the models' weights are
                swapped.
        """
        momentum = check_momentum(momentum)
        with self._lock, torch.no_grad():
            self._refuse_inside_swap("update()")
            plan, online = self._current_plan()
            self._check_momentum_fits(momentum, plan)
            plan.copies.write(online)
            self._chosen.update(plan, momentum)
            if plan.on_cuda and torch.cuda.is_current_stream_capturing():
                self._captured.append(plan)  # the graph goes on reading its chunk table
            plan.wrote()
            self.update_index += 1

    @_disable_dynamo
    def sync(self) -> None:
        """Copy the online model into the EMA model, buffers too, e.g. after loading weights.

        SIGINT (Ctrl-C) is deferred meanwhile.

        Raises:
            ValueError: A tensor changed its shape or vanished.
            RuntimeError: The models' weights are swapped.
        """
        with self._lock, Deferred(), torch.no_grad():
            self._refuse_inside_swap("sync()")
            plan, online = self._current_plan()
            plan.copies.write(online)
            for bucket in plan.buckets:
                reference.copy_bucket(bucket)
            for pair in plan.kept:
                current = pair.online_slots[0].read()
                if current is not None:
                    for slot in pair.ema_slots:
                        slot.write(own_copy(current, pair.ema.dtype))
            plan.wrote()

    def swapped(self) -> AbstractContextManager[nn.Module]:
        """A context in which the online model has the EMA's weights and buffers, to be evaluated.

        The values change places, at unchanged addresses: one pass on a GPU, on a CPU with at most a
        chunk of extra memory. (Where EMA and online dtypes differ, and for what is copied and not
        averaged, the online values wait in a copy.) They are back after any exception. SIGINT
        (Ctrl-C) is deferred while they move; inside, where its handler raises, they are back before
        the exception goes on. Inside, `update`, `sync`, `load_state_dict` and another swap are
        errors, `state_dict` is what it is outside, and a write to the weights is warned of on exit.

        Raises:
            RuntimeError: They are swapped already.

        Example:
            >>> model = torch.nn.Linear(2, 1)
            >>> ema = ModelEMA(model)
            >>> _ = ema.ema_model.weight.data.fill_(0.5)
            >>> with ema.swapped() as evaluated:
            ...     print(evaluated is model, model.weight.tolist())
            True [[0.5, 0.5]]
        """
        return SwapContext(self._swap_in, self._swap_out)

    def follow(self, optimizer: torch.optim.Optimizer, schedule: Schedule) -> RemovableHandle:
        """Update after every step that the optimizer really makes.

        Accumulating gradients makes no step, nor does `GradScaler` where gradients overflowed. (A
        fused optimizer is called then too, and is asked whether it stepped, which waits for the
        device; of other optimizers `GradScaler` has waited itself.)

        Args:
            optimizer: The optimizer of the online model.
            schedule: From the update index, counting from 1, to the momentum; also in `schedule`.

        Returns:
            A handle whose `remove()` ends it.

        Raises:
            RuntimeError: It follows an optimizer already.
            ValueError: The optimizer has none of the model's parameters.
            TypeError: The schedule is not a function.

        Example:
            >>> model = torch.nn.Linear(2, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> ema = ModelEMA(model)
            >>> handle = ema.follow(optimizer, lambda update_index: 0.1)
            >>> model(torch.ones(2)).backward()
            >>> optimizer.step()
            >>> ema.update_index
            1
        """
        hooks = None if self._following is None else self._following.hooks_dict_ref()
        if self._following is not None and hooks is not None and self._following.id in hooks:
            raise RuntimeError(
                "This EMA follows an optimizer already; following two, it would update twice per "
                "iteration. Call remove() on the first handle, or follow the optimizer that steps "
                "last."
            )
        check_schedule(schedule)
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(parameter) in trained for parameter in self.model.parameters()):
            raise ValueError(
                "The optimizer has none of this model's parameters, so its steps do not change the "
                "model. Give the optimizer that trains it, and build that after moving the model."
            )
        self._schedule = schedule
        self._following = optimizer.register_step_post_hook(self._after_step)
        return self._following

    @property
    def schedule(self) -> Schedule | None:
        """The function from the update index to the momentum, if there is one; may be assigned."""
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        check_schedule(schedule)
        self._schedule = schedule

    def nonfinite_count(self) -> int:
        """How many values were skipped so far, in all tensors; the sum of `nonfinite_counts`.

        Raises:
            RuntimeError: With nonfinite="propagate" nothing is counted.
        """
        return sum(self.nonfinite_counts().values())

    def nonfinite_counts(self) -> dict[str, int]:
        """How many values of each averaged tensor were skipped so far; waits for the device.

        A value that is not finite in the online model counts at each update. A complex number has
        two values. Of a sharded tensor, those of this rank's part count.

        Returns:
            Skip counts by clean name, of a tied tensor by the first of its names, zeros included.

        Raises:
            RuntimeError: With nonfinite="propagate" nothing is counted.

        Example:
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
            return self._known_plan().nonfinite_counts()

    def distance(self) -> Distance:
        r"""How far the EMA is from the online model, overall and by top-level module.

        .. math:: \|\theta_{EMA} - \theta\|_2 \text{ and } \|\theta\|_2

        over the averaged tensors, in fp64, of the values that an exact EMA accumulates, in
        memory that does not grow with the model. Waits for the device, and of a sharded model for
        the other ranks, which have to call it too.

        Raises:
            ValueError: A tensor changed its shape or vanished.
            RuntimeError: The models' weights are swapped.

        Example:
            >>> model = torch.nn.Linear(2, 1, bias=False)
            >>> _ = model.weight.data.fill_(3.0)
            >>> ema = ModelEMA(model)
            >>> _ = ema.ema_model.weight.data.copy_(torch.tensor([[3.0, -1.0]]))
            >>> ema.distance().distance
            4.0
        """
        with self._lock, torch.no_grad():
            self._refuse_inside_swap("distance()")
            plan, _ = self._current_plan()
            averaged = [
                pair for pair in plan.averaged if self._groups.scale(pair.names) is not None
            ]
            return distance.measure(averaged, plan)

    def state_dict(self, *, clone: bool = False, full_state_dict: bool = False) -> dict[str, Any]:
        """The EMA's state by clean name, for `torch.save` or `torch.distributed.checkpoint`.

        Of a sharded model the tensors are `DTensor`s, which `torch.distributed.checkpoint` saves
        from, and loads onto, any number of ranks. It holds the update index, the schedule (as
        JSON; None for a function that is not one of `ema_triton.schedules`), the EMA model's
        parameters and persistent buffers ("weights"), what an exact EMA keeps beside them
        ("residuals"), and from where stochastic rounding goes on ("rounding"). No hooks are
        called, and no extra state is in it: `ema_model.state_dict()` has that.

        Args:
            clone: Whether to copy the tensors. They are shared otherwise, as those of a module's
                state dict: a thread that saves them while another one updates needs copies.
            full_state_dict: Whether to gather whole tensors on rank 0, on its CPU; the other ranks,
                which all have to call this, get an empty dict.
        """
        # No key that users would name the whole by: Ignite's Checkpoint tells a state saved alone
        # from one among others by that name.
        with self._lock, torch.no_grad():
            plan = self._known_plan()
            shards.reshard(self._ema_model)
            own = persistent_tensors(self._ema_model)
            weights = own if self._swap is None else self._swap.outside(own)
            exact = {name: one for one in plan.exact for name in one.pair.names}
            residuals = {
                name: shards.like(exact[name].residual, value)
                for name, value in own.items()
                if name in exact and exact[name].is_in_place()
            }
            if clone and not full_state_dict:
                weights, residuals = (
                    {name: value.clone() for name, value in tensors.items()}
                    for tensors in (weights, residuals)
                )
            if full_state_dict:
                weights, residuals = ranks.gathered(weights), ranks.gathered(residuals)
                if not ranks.is_first():
                    return {}
            return {
                "version": VERSION,
                "update_index": self.update_index,
                "schedule": self._schedule_as_json(),
                "weights": weights,
                "precision": self.precision,
                "residuals": residuals,
                "rounding": (
                    {"seed": plan.seed, "updates": plan.updates}
                    if self.precision == "stochastic"
                    else None
                ),
            }

    def load_state_dict(
        self, state: Mapping[str, Any] | None, *, full_state_dict: bool = False
    ) -> None:
        """Load what `state_dict` returned, or a module's state dict, and go on from there.

        Values are converted to this EMA's dtypes and precision. A warning says what had to be
        rounded, and what the state does not tell; and where its schedule replaces another one. Of a
        sharded model, each rank takes its part of a tensor that is not sharded. All is compared
        before anything is loaded, and SIGINT (Ctrl-C) is deferred while it is.

        Args:
            state: The state.
            full_state_dict: Whether rank 0 alone has it, with whole tensors; what the other ranks
                give, who all have to call this, is not looked at.

        Raises:
            ValueError: The state is not of this kind or version, or names or shapes do not fit.
                Nothing has been loaded then.
            RuntimeError: The models' weights are swapped.
        """
        what = "load_state_dict()"
        if full_state_dict:
            with self._lock, torch.no_grad():
                self._refuse_inside_swap(what)
                shards.reshard(self._ema_model)
                self._load(spread_from_first(state, self._ema_model), what)
        else:
            self._load(Saved.of(state), what)

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
            if not is_sharded(self.model):
                files.write_weights(path, self.state_dict()["weights"], self.update_index)
                return
            weights = self.state_dict(full_state_dict=True).get("weights", {})
            ranks.from_first(lambda: files.write_weights(path, weights, self.update_index))

    def load_weights(self, source: Mapping[str, Any] | str | os.PathLike[str]) -> None:
        """Load the weights that this or another library saved, and go on from there.

        Recognised are a module's state dict (Ignite, PyTorch) in any nesting of `module.` and
        `_orig_mod.`, `torch.optim.swa_utils.AveragedModel`, timm's checkpoints and `ModelEmaV3`,
        ema-pytorch's `EMA`, diffusers' `EMAModel`, and what `state_dict` and `save_weights` made.
        The update index and the schedule stay; a warning says what another library's state counts.

        Args:
            source: A dict; or a file of safetensors or `torch.save`, told by its content.

        Raises:
            ValueError: It is none of these, or damaged, or names or shapes do not fit. Nothing has
                been loaded then.
            OSError: The file cannot be opened.
            RuntimeError: The models' weights are swapped.

        Example:
            >>> model = torch.nn.Linear(2, 1)
            >>> averaged = torch.optim.swa_utils.AveragedModel(model)
            >>> ema = ModelEMA(model)
            >>> ema.load_weights(averaged.state_dict())
        """
        found, remarks = weights_from(source, self._ema_model)
        self._load(found, "load_weights()", remarks)

    def _load(self, found: Saved, what: str, remarks: Sequence[str] = ()) -> None:
        """Load it, and warn of what was lost."""
        with self._lock, torch.no_grad():
            self._refuse_inside_swap(what)
            plan, _ = self._current_plan()
            with Deferred():
                lost = [*load(found, self._ema_model, plan), *remarks]
                if self.precision == "stochastic" and found.precision == "stochastic":
                    counts = plan.nonfinite_counts()
                    self._memory = Memory({}, found.seed, found.updates, counts)
                    self._backend = None  # the next plan counts from there
                elif self.precision == "stochastic" and found.precision is None:
                    lost.append(
                        "a module's state dict does not tell from where stochastic rounding goes "
                        f"on, which keeps its seed {plan.seed} and its count of {plan.updates} "
                        "updates"
                    )
                said = [f"The state was loaded; but {'; '.join(lost)}."] if lost else []
                if found.update_index is not None:
                    self.update_index = found.update_index
                if found.schedule is not None:
                    if self._schedule not in (None, found.schedule):
                        said.append(
                            f"The checkpoint's schedule {found.schedule} replaces this handler's "
                            f"{self._schedule}. To keep another one, assign handler.schedule after "
                            "loading."
                        )
                    self._schedule = found.schedule
        for remark in said:
            warnings.warn(remark, UserWarning, stacklevel=3)

    def __getstate__(self) -> dict[str, Any]:
        """Without the plan: its addresses mean nothing to a copy or to another process."""
        with self._lock:
            self._refuse_inside_swap("copying or pickling the EMA")
            memory = self._memory
            if memory is None and self._plan is not None:
                memory = self._plan.memory()
            state = {
                **self.__dict__,
                "_plan": None,
                "_backend": None,
                "_captured": [],
                "_memory": memory,
                "_following": None,
            }
            del state["_lock"]
            return state

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelEMA:
        """All of it in one piece, while no other thread updates."""
        with self._lock:
            twin = memo[id(self)] = type(self).__new__(type(self))
            twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
            return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    def _schedule_as_json(self) -> str | None:
        # One value: torch.distributed.checkpoint would take a dict's keys apart, and miss them if
        # the schedule is another one when it loads.
        state = None if self._schedule is None else schedule_to_state(self._schedule)
        return None if state is None else json.dumps(state)

    def _swap_in(self) -> nn.Module:
        with self._lock, torch.no_grad():
            self._refuse_inside_swap("swapped()")
            plan, _ = self._current_plan()
            swap = Swap(self.model, self._ema_model, plan, self._chosen.exchange)
            swap.enter()
            self._swap = swap
            return self.model

    def _swap_out(self) -> None:
        with self._lock:
            swap, self._swap = self._swap, None
            if swap is None:
                return
            # SIGINT may end the swap where FakeTensorMode or another stream is active.
            stream = nullcontext() if swap.stream is None else torch.cuda.stream(swap.stream)
            with stream, torch._C._DisableTorchDispatch():
                swap.leave()

    def _refuse_inside_swap(self, what: str) -> None:
        if self._swap is not None:
            raise RuntimeError(
                f"{what} while the models' weights are swapped: the online model holds the EMA's. "
                "Leave the context of swapped() (or end the evaluation that attach_swap() belongs "
                "to) first. Nothing was changed."
            )

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        # Where GradScaler leaves it to the optimizer to skip the step, this says whether it did.
        overflowed = getattr(optimizer, "found_inf", None)
        if overflowed is not None and bool(overflowed):
            return
        assert self._schedule is not None
        self.update(momentum_from(self._schedule, self.update_index + 1))

    @property
    def _chosen(self) -> Backend:
        if self._backend is None:  # unpickled, or a copy
            self._make_plan()
        assert self._backend is not None
        return self._backend

    def _known_plan(self) -> Plan:
        """The last plan, stale or not, with all that is known beside the weights."""
        return self._make_plan() if self._plan is None or self._memory is not None else self._plan

    def _current_plan(self) -> tuple[Plan, list[Tensor]]:
        """A plan that is not stale, and the online tensors that it copies."""
        plan = self._plan
        if plan is not None and self._backend is not None and not plan.is_stale():
            online = plan.copies.read()
            if online is not None:
                return plan, online
        # Perhaps a forward has only gathered the shards.
        shards.reshard(self.model, self._ema_model)
        if plan is None or self._backend is None or plan.is_stale() or plan.copies.read() is None:
            plan = self._make_plan()
        online = plan.copies.read()
        assert online is not None  # just planned
        return plan, online

    def _make_plan(self, ema_dtype: torch.dtype | None = None) -> Plan:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "A CUDA graph is being captured, and the EMA is not ready for it: it is new, or a "
                "tensor of the online or the EMA model moved since the last update, and the graph "
                "would keep old addresses. Call update() once after the last change of the models, "
                "then capture."
            )
        # An update on another stream may still be writing the EMA, which the new plan reads.
        self._wait_for_devices()
        # Tensors made in inference mode could never be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            plan = make_plan(
                self.model,
                self._ema_model,
                self.handle_buffers,
                ema_dtype=ema_dtype,
                precision=self.precision,
                groups=self._groups,
                guarded=self.nonfinite == "skip",
                previous=self._plan,
                memory=self._memory,
            )
            # What reads the old plan's memory, before that is freed: the copies into the new one.
            self._wait_for_devices()
            # The tensors lie as the plan says, whether or not a backend can be found for it.
            last, self._backend = self._backend, None
            self._plan, self._memory = plan, None
            self._backend = choose(self._requested_backend, plan)
        if last is None or last.reason != self._backend.reason:
            logger.info("EMA backend: %s (%s)", self._backend.name, self._backend.reason)
        return plan

    def _wait_for_devices(self) -> None:
        """Wait until all streams have done what the plan's tensors are in use for."""
        for device in {bucket.key.device for bucket in self._plan.buckets} if self._plan else ():
            if device.type == "cuda":
                torch.cuda.synchronize(device)

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
                and bucket.key.ema_dtype in RESIDUAL_DTYPE
            ):
                resolution = torch.finfo(bucket.key.ema_dtype).eps
                share = bucket.share(momentum)
                if bucket.key.scale is not None and 0 < share < resolution:
                    self._warned = True
                    warnings.warn(
                        f"momentum {share:g} is below the resolution of {bucket.key.ema_dtype} "
                        f"({resolution:g}): most updates of the EMA round away, and it stands "
                        "still. precision='exact', the default, keeps what precision='nearest' "
                        "rounds away.",
                        stacklevel=5,  # past the two frames of _disable_dynamo
                    )
