"""State outlives plans: random numbers, skip counts, other processes, shared memory."""

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_triton import ModelEMA
from tests.checkpoint.test_state_dict import (
    BF16,
    DEVICE,
    FP16,
    FP32,
    KEYS,
    Net,
    assert_same_state,
    through_file,
    train,
)
from tests.plain import PlainEMA, as_real, move


class Parts(nn.Module):
    """Sizes of one chunk or two, so that no tensor begins where another one would."""

    def __init__(self) -> None:
        super().__init__()
        for name, size in (("a", 5), ("b", 700), ("c", 8200), ("d", 33), ("e", 1)):
            self.register_parameter(name, nn.Parameter(torch.zeros(size, device=DEVICE)))

    def set(self, step: int) -> None:
        """Multiples of 1/8 below 8, which bf16 and fp16 hold exactly."""
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in self.parameters():
                values = torch.randint(-63, 64, parameter.shape, generator=generator) / 8
                parameter.copy_(values)


def cast(model: nn.Module, dtype: torch.dtype, *names: str) -> None:
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.data = parameter.data.to(dtype)


def cast_to_two(model: nn.Module) -> None:
    cast(model, BF16, "a", "c")
    cast(model, FP16, "b")


def there_and_back(model: nn.Module) -> None:
    cast(model, BF16, "b", "c")
    cast(model, FP32, "b", "c")


CASTS: dict[str, Callable[[nn.Module], None]] = {
    "all to bf16": lambda model: cast(model, BF16, *"abcde"),
    "a part to bf16": lambda model: cast(model, BF16, "b", "d"),
    "a part to bf16, one to fp16": cast_to_two,
    "there and back": there_and_back,
}


def rounded(
    backend: str,
    change: Callable[[nn.Module], None] | None = None,
    *,
    at: int = 2,
    duplicate: Callable[[ModelEMA], ModelEMA] = lambda ema: ema,
    **options: Any,
) -> tuple[list[dict[str, Tensor]], dict[str, int]]:
    """The EMA's weights after each of four updates, and from where its rounding goes on."""
    model, found = Parts(), []
    if change is not None and at == -1:
        change(model)
    options = {"precision": "stochastic", "seed": 3, **options}
    ema = ModelEMA(model, ema_dtype=BF16, backend=backend, **options)
    for step in range(4):
        if change is not None and at == step:
            change(ema.model)
            ema = duplicate(ema)
        ema.model.set(step)
        ema.update(0.3)
        found.append(ema.state_dict(clone=True)["weights"])
    return found, ema.state_dict()["random_state"]


def all_equal(left: list[dict[str, Tensor]], right: list[dict[str, Tensor]]) -> bool:
    return all(
        torch.equal(one[name], other[name])
        for one, other in zip(left, right, strict=True)
        for name in "abcde"
    )


@pytest.mark.parametrize("at", [2, -1], ids=["in mid-training", "before the EMA is built"])
@pytest.mark.parametrize("change", CASTS)
def test_a_cast_of_the_online_model_changes_no_random_number(
    change: str, at: int, backend: str
) -> None:
    uncast, random_state = rounded(backend)
    assert random_state == {"seed": 3, "updates": 4}
    found, after = rounded(backend, CASTS[change], at=at)
    assert after == random_state
    assert all_equal(found, uncast)


def test_another_seed_or_no_chance_gives_other_values(backend: str) -> None:
    uncast, _ = rounded(backend)
    other, _ = rounded(backend, seed=4)
    nearest, _ = rounded(backend, precision="exact")
    for values in (other, nearest):
        for name in "bcd":
            assert not torch.equal(values[0][name], uncast[0][name])


def resumed(ema: ModelEMA) -> ModelEMA:
    other = ModelEMA(
        copy.deepcopy(ema.model), ema_dtype=BF16, precision="stochastic", backend=ema.backend
    )
    other.load_state_dict(through_file(ema.state_dict()))
    return other


DUPLICATES: dict[str, Callable[[ModelEMA], ModelEMA]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda ema: pickle.loads(pickle.dumps(ema)),
    "state": resumed,
}


@pytest.mark.parametrize("duplicate", DUPLICATES)
def test_a_copy_of_a_cast_run_draws_the_same_numbers(duplicate: str, backend: str) -> None:
    uncast, random_state = rounded(backend)
    change = CASTS["a part to bf16"]
    found, after = rounded(backend, change, duplicate=DUPLICATES[duplicate])
    assert after == random_state
    assert all_equal(found, uncast)


def channels_last(ema: ModelEMA) -> None:
    ema.model.image.weight.data = ema.model.image.weight.data.contiguous()
    ema.update(0.0)
    ema.model.to(memory_format=torch.channels_last)


def replace_parameter(ema: ModelEMA) -> None:
    ema.model.scale = nn.Parameter(ema.model.scale.detach().clone())


SKIPPING: dict[str, Callable[[ModelEMA], ModelEMA | None]] = {
    "part of the online model cast": lambda ema: cast(ema.model, BF16, "body.weight", "scale"),
    "the online model widened": lambda ema: cast(ema.model, torch.float64, "frozen", "body.bias"),
    "memory format": channels_last,
    "deepcopy": copy.deepcopy,
    "a parameter replaced": replace_parameter,
    "the EMA model cast": lambda ema: cast(ema.ema_model, BF16, "body.weight", "image.weight"),
    "pickle": lambda ema: pickle.loads(pickle.dumps(ema)),
    "a state loaded": lambda ema: ema.load_state_dict(ema.state_dict()),
    "synced": lambda ema: ema.sync(),
}


@pytest.mark.parametrize("as_module", [True, False])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_skip_counts_survive_all_of_it(dtype: torch.dtype, as_module: bool, backend: str) -> None:
    ema = ModelEMA(Net(dtype), nonfinite="skip", as_module=as_module, backend=backend)
    # A tied tensor has one, by the first of its names.
    counts = {name: 0 for name, _ in ema.model.named_parameters()}
    for step, change in enumerate(["nothing", *SKIPPING]):
        if as_module or change != "the EMA model cast":
            changed = SKIPPING.get(change, lambda ema: None)(ema)
            ema = changed if isinstance(changed, ModelEMA) else ema
        assert ema.nonfinite_counts() == counts, change
        move(ema.model, step)
        with torch.no_grad():
            for index, (name, parameter) in enumerate(ema.model.named_parameters()):
                values = as_real(parameter)
                places = torch.arange(values.numel(), device=DEVICE).view(values.shape)
                values.masked_fill_(places % 3 == (step + index) % 3, float("nan"))
                counts[name] += int(values.isnan().sum())
        ema.update(0.3)
        assert ema.nonfinite_counts() == counts, change
        state = ema.state_dict()
        assert state.keys() == KEYS
        assert all(value.isfinite().all() for value in state["weights"].values())
        with torch.no_grad():
            for parameter in ema.model.parameters():
                as_real(parameter).nan_to_num_(0.0)
    assert {name for name, count in counts.items() if not count} == {"nothing"}


def test_skip_counts_are_no_part_of_the_state() -> None:
    ema, other = (ModelEMA(nn.Linear(2, 2), nonfinite="skip") for _ in range(2))
    ema.model.weight.data.fill_(float("inf"))
    ema.update(0.3)
    other.model.bias.data[0] = float("nan")
    other.update(0.3)
    other.load_state_dict(ema.state_dict())
    assert ema.nonfinite_counts() == {"weight": 4, "bias": 0}
    assert other.nonfinite_counts() == {"weight": 0, "bias": 1}


def go_on(folder: str) -> None:
    """What the other process does."""
    torch.set_num_threads(1)
    for path in Path(folder).iterdir():
        ema = pickle.loads(path.read_bytes())
        train(ema, range(3, 6))
        path.write_bytes(pickle.dumps(ema))


OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {"nonfinite": "skip", "handle_buffers": "update"},
    "stochastic": {"precision": "stochastic", "seed": 9},
    "no module": {"as_module": False, "nonfinite": "skip"},
    "in shared memory": {},
}


def test_a_pickle_goes_on_in_another_process_bit_by_bit(tmp_path: Path) -> None:
    emas = {
        name: ModelEMA(Net(BF16, torch.device("cpu")), backend="foreach", **options)
        for name, options in OPTIONS.items()
    }
    emas["in shared memory"].ema_model.share_memory()
    for name, ema in emas.items():
        train(ema, range(2))
        if ema.nonfinite == "skip":
            ema.model.scale.data.fill_(float("inf"))
        ema.update(0.3)
        ema.model.scale.data.fill_(1.0)
        (tmp_path / name).write_bytes(pickle.dumps(ema))
    program = f"from tests.test_state_outlives_plans import go_on; go_on({str(tmp_path)!r})"
    folder = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name, ema in emas.items():
        other = pickle.loads((tmp_path / name).read_bytes())
        assert (ema.update_index, other.update_index) == (3, 6)
        before = ema.state_dict(clone=True)["weights"]["body.weight"]
        train(ema, range(3, 6))
        assert_same_state(other, ema)
        assert not torch.equal(ema.state_dict()["weights"]["body.weight"], before)
        if ema.nonfinite == "skip":
            assert other.nonfinite_counts() == ema.nonfinite_counts()
            assert other.nonfinite_counts()["scale"] == 1
        for average in (ema, other):
            train(average, range(6, 8))
        assert_same_state(other, ema)


@pytest.mark.parametrize("options", [{}, {"as_module": False}, {"exclude": "0"}])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_pickle_has_each_byte_once(dtype: torch.dtype, options: dict[str, Any]) -> None:
    model = nn.Sequential(*[nn.Linear(128, 128) for _ in range(5)]).to(dtype)
    ema = ModelEMA(model, **options)
    train(ema, range(2))
    state = ema.state_dict()
    tensors = [*model.parameters(), *state["weights"].values(), *state["residuals"].values()]
    payload = sum(tensor.nbytes for tensor in tensors)
    file = io.BytesIO()
    torch.save(ema, file)
    # A tensor's frame takes less than 1 kB, whatever its size.
    for size in (len(pickle.dumps(ema)), len(file.getvalue())):
        assert payload <= size <= payload + 1024 * len(tensors) + 4096


def answer(tensors: dict[str, dict[str, Tensor]], pipe: Connection) -> None:
    """Read for the other process what is in its tensors."""
    torch.set_num_threads(1)
    while (question := pipe.recv()) is not None:
        name, key = question
        pipe.send(tensors[name][key].tolist())


def shared_emas() -> dict[str, ModelEMA]:
    cpu = torch.device("cpu")
    found = {
        "fp32": ModelEMA(Net(FP32, cpu), backend="foreach"),
        "exact": ModelEMA(Net(BF16, cpu), backend="foreach"),
        "buffers": ModelEMA(Net(FP32, cpu), handle_buffers="update"),
        "no module": ModelEMA(Net(FP32, cpu), as_module=False),
    }
    if DEVICE.type == "cpu" and find_spec("triton") is not None:
        found["triton"] = ModelEMA(Net(BF16, cpu), backend="triton")
    for name, ema in found.items():
        if name == "no module":
            for tensor in ema.state_dict()["weights"].values():
                tensor.share_memory_()
        else:
            ema.ema_model.share_memory()
    given = Net(FP32, cpu).share_memory()
    found["given"] = ModelEMA(Net(FP32, cpu), ema_model=given)
    return found


def test_a_reader_in_another_process_sees_the_updates() -> None:
    emas = shared_emas()
    keys = ["body.weight", "image.weight", "head.weight", "scale", "norm.running_mean"]
    tensors, plain = {}, {}
    for name, ema in emas.items():
        plain[name] = PlainEMA(ema.model, handle_buffers=ema.handle_buffers)
        if name == "given":
            plain[name].values = ema.state_dict(clone=True)["weights"]
        tensors[name] = ema.state_dict()["weights"]
        if name != "no module":
            tensors[name] = ema.ema_model.state_dict()
        tensors[name] = {key: tensors[name][key] for key in keys}
    context = torch.multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    reader = context.Process(target=answer, args=(tensors, there), daemon=True)
    reader.start()
    there.close()
    seen = []
    try:
        for step in range(4):
            for name, ema in emas.items():
                if step == 2:  # a new plan
                    ema.model.body.weight.data = ema.model.body.weight.data.bfloat16()
                move(ema.model, step)
                ema.update(0.3)
                plain[name].update(0.3)
                weights = ema.state_dict()["weights"]
                plain[name].check(weights)
                for key in keys:
                    here.send((name, key))
                    values = here.recv()
                    assert values == weights[key].tolist(), (step, name, key)
                    assert weights[key].is_shared(), (step, name, key)
                    seen.append((name, key, str(values)))
        here.send(None)
        reader.join(60)
        assert reader.exitcode == 0
    finally:
        reader.kill()
        reader.join()
    # They moved at each step.
    assert len({*seen}) == len(seen) == 4 * len(emas) * len(keys)


def test_residuals_stay_beside_shared_weights() -> None:
    """A copy that is not shared goes on alike, bit by bit."""
    ema = ModelEMA(Net(BF16, torch.device("cpu")), backend="foreach")
    train(ema, range(2))
    twin = copy.deepcopy(ema)
    ema.ema_model.share_memory()
    assert_same_state(ema, twin)
    for average in (ema, twin):
        train(average, range(2, 5))
    assert ema.ema_model.body.weight.is_shared()
    assert not twin.ema_model.body.weight.is_shared()
    assert_same_state(ema, twin)
