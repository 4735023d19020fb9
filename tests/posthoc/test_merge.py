"""Merged checkpoints: the coefficients, the values, what is refused, and what is said of it all."""

import hashlib
import json
import math
import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

pytest.importorskip("safetensors")

import safetensors.torch

from ema_triton import ModelEMA
from ema_triton.ops.precision import narrow_once
from ema_triton.posthoc import files, merge
from ema_triton.posthoc.merging import DECAYS, decay_coefficients

BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def save(folder: Path, name: str, state: dict, kind: str = "pt") -> Path:
    path = folder / f"{name}.{kind}"
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    elif kind == "dcp":
        with pytest.warns(UserWarning, match="single process"):
            dcp.save({"model": state}, checkpoint_id=path)
    else:
        torch.save(state, path)
    return path


def load(path: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(path)


def checkpoints(dtype: torch.dtype, count: int = 3) -> list[dict[str, Tensor]]:
    return [
        {
            "weight": (torch.rand(7, 5) + 0.5).to(dtype),
            "scalar": torch.tensor(1.0 + step, dtype=dtype),
            "empty": torch.empty(2, 0, dtype=dtype),
            "count": torch.tensor(10 * step),
        }
        for step in range(count)
    ]


def exact(tensors: list[Tensor], coefficients: list[float]) -> list[Fraction]:
    values = [tensor.double().flatten().tolist() for tensor in tensors]
    return [
        sum(
            (Fraction(c) * Fraction(v) for c, v in zip(coefficients, column, strict=True)),
            Fraction(0),
        )
        for column in zip(*values, strict=True)
    ]


def assert_nearest(found: Tensor, expected: list[Fraction], slack: float = 0.0) -> None:
    """No neighbour of a (positive) value is closer to what is expected of it."""
    bits = found.contiguous().view(BITS[found.itemsize])
    for step in (-1, 1):
        other = (bits + step).view(found.dtype).double().flatten().tolist()
        for mine, beside, true in zip(
            found.double().flatten().tolist(), other, expected, strict=True
        ):
            assert abs(Fraction(mine) - true) <= abs(Fraction(beside) - true) + slack * true


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("equal", [0.25, 0.25, 0.25, 0.25]),
        ("linear", [0.25, 0.25, 0.25, 0.25]),
        ("1-sqrt", [0.5, 0.2071067812, 0.1589186226, 0.1339745962]),
        ("cosine", [0.1464466094, 0.3535533906, 0.3535533906, 0.1464466094]),
    ],
)
def test_coefficients_are_what_the_learning_rate_loses(shape, expected) -> None:
    assert decay_coefficients(shape, 4) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("shape", DECAYS)
def test_a_merge_is_the_training_with_that_decay(shape, tmp_path) -> None:
    """SGD: what checkpoint j adds to the one before is a step, which then has the decayed rate."""
    count = 6
    steps = torch.randn(count, 4, dtype=torch.float64)
    online = steps.cumsum(0)  # the first is the weights before the decay
    paths = [save(tmp_path, str(j), {"w": weight}) for j, weight in enumerate(online)]
    merge(paths, shape, out=tmp_path / "out")
    rates = torch.tensor([DECAYS[shape](j / count) for j in range(count)]).double()
    assert torch.allclose(load(tmp_path / "out")["w"], (rates[:, None] * steps).sum(0), rtol=1e-6)
    for n in range(1, 40):
        assert math.fsum(decay_coefficients(shape, n)) == pytest.approx(1, abs=1e-15)
        assert min(decay_coefficients(shape, n)) > 0


def test_a_merge_is_an_ema_whose_schedule_is_known_in_advance(tmp_path) -> None:
    coefficients = decay_coefficients("1-sqrt", 5)
    model = nn.Linear(3, 3).double()
    ema, paths = ModelEMA(model), []
    for j in range(5):
        with torch.no_grad():
            model.weight.normal_()
        ema.update(coefficients[j] / sum(coefficients[: j + 1]))
        paths.append(save(tmp_path, str(j), model.state_dict()))
    merge(paths, "1-sqrt", out=tmp_path / "out")
    torch.testing.assert_close(load(tmp_path / "out"), dict(ema.ema_model.state_dict()))


@pytest.mark.parametrize("kind", ["pt", "safetensors", "dcp"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_each_value_is_the_nearest_to_the_exact_average(dtype, kind, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(files, "PIECE", 8)  # of 35 elements
    states = checkpoints(dtype)
    paths = [save(tmp_path, str(j), state, kind) for j, state in enumerate(states)]
    coefficients = [0.2, 0.3, 0.5]
    merge(paths, coefficients, out=tmp_path / "out")
    found = load(tmp_path / "out")
    assert found["count"] == 20
    assert found["empty"].shape == (2, 0)
    for name in ("weight", "scalar"):
        assert found[name].dtype == dtype
        assert found[name].shape == states[0][name].shape
        expected = exact([state[name] for state in states], coefficients)
        assert_nearest(found[name], expected, slack=1e-15)  # fp64 has its own rounding


def test_that_check_can_fail(tmp_path) -> None:
    states = checkpoints(torch.bfloat16)
    expected = exact([state["weight"] for state in states], [0.2, 0.3, 0.5])
    step = states[0]["weight"] * 0.2 + states[1]["weight"] * 0.3 + states[2]["weight"] * 0.5
    with pytest.raises(AssertionError):
        assert_nearest(step, expected, slack=1e-15)


@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 7), (torch.float16, 10)])
def test_it_is_rounded_once(dtype, digits, tmp_path) -> None:
    """A little above the middle of two values, which in fp32 is the middle and rounds to even."""
    above = 2.0 ** -(digits + 1) + 2.0**-40
    states = [{"w": torch.tensor([1.0, -1.0]).double()}]
    states.append({"w": torch.tensor([1 + 2 * above, -1 - 2 * above], dtype=torch.float64)})
    paths = [save(tmp_path, str(j), state) for j, state in enumerate(states)]
    merge(paths, out=tmp_path / "out", dtype=dtype)
    found = load(tmp_path / "out")["w"]
    assert found.tolist() == [1 + 2.0**-digits, -1 - 2.0**-digits]
    twice = torch.tensor([1 + above]).double().fill_(1 + above).float().to(dtype)
    assert twice.tolist() == [1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_random_and_special_numbers(dtype) -> None:
    middle = (torch.rand(2000) + 1).to(dtype)
    beside = (middle.view(torch.int16) + 1).view(dtype)
    value = (middle.double() + beside.double()) / 2 * (1 + 1e-12 * torch.randn(2000).double())
    for scale in (1.0, 2.0**-14, 2.0**-18):  # fp16's subnormal numbers too
        scaled = value * scale
        assert_nearest(narrow_once(scaled, dtype), [Fraction(v) for v in scaled.tolist()])
    infinity = float("inf")
    special = torch.tensor([0.0, -0.0, infinity, -infinity, 1e300, 1e-300, float("nan")]).double()
    special[4], special[5] = 1e300, -1e-300
    found = narrow_once(special, dtype)
    assert found[:5].tolist() == [0, 0, infinity, -infinity, infinity]
    assert torch.signbit(found[:6]).tolist() == [False, True, False, True, False, True]
    assert found[5] == 0
    assert found[6].isnan()


def test_the_file_says_what_it_was_made_of(tmp_path) -> None:
    states = checkpoints(torch.float32, 2)
    paths = [save(tmp_path, "a", states[0]), save(tmp_path, "b", states[1], "dcp")]
    merged = merge(paths, [0.25, 0.75], out=tmp_path / "out", key=None)
    with safetensors.safe_open(tmp_path / "out", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"  # transformers wants it
    first, second = json.loads(metadata["merged_from"])
    assert [first, second] == merged
    digest = hashlib.sha256(paths[0].read_bytes()).hexdigest()
    assert first == {"path": str(paths[0]), "coefficient": 0.25, "sha256": {"a.pt": digest}}
    assert second["sha256"].keys() == {".metadata", "__0_0.distcp"}


def test_an_ema_and_a_model_load_it(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    merge([save(tmp_path, "a", model.state_dict())], out=tmp_path / "out")
    model.load_state_dict(load(tmp_path / "out"))
    ModelEMA(model).load_weights(tmp_path / "out")


@pytest.mark.parametrize(
    ("coefficients", "text"),
    [
        ([0.5, 0.25], "An average of 3 checkpoints takes as many coefficients, finite and not "
         "negative, but got 0.5,0.25."),
        ([1, 2, 1], "1,2,1 sum to 4, not to 1. Divide each by the sum."),
        ([0.3333, 0.3333, 0.3333], "sum to 0.9999, not to 1"),
        ([0, 0, 0], "sum to 0, not to 1. Divide each by the sum."),
        ([1.5, -1, 0.5], "finite and not negative, but got 1.5,-1,0.5."),
        ([1, float("nan"), 0], "finite and not negative, but got 1,nan,0"),
        ("sqrt", "Coefficients have a shape, equal, linear, 1-sqrt, cosine, or are a number for "
         "each checkpoint, but got 'sqrt'."),
    ],
)  # fmt: skip
def test_coefficients_that_are_no_average(coefficients, text, tmp_path) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        merge(["no", "such", "file"], coefficients, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_coefficients_that_were_rounded_sum_to_one(tmp_path) -> None:
    paths = [save(tmp_path, str(j), {"w": torch.ones(3, dtype=torch.float64)}) for j in range(3)]
    coefficients = torch.tensor([1.0, 2, 4]).softmax(0).tolist()
    assert math.fsum(coefficients) != 1
    merged = merge(paths, coefficients, out=tmp_path / "out")
    assert math.fsum(one["coefficient"] for one in merged) == 1
    torch.testing.assert_close(
        load(tmp_path / "out")["w"], torch.ones(3).double(), rtol=1e-15, atol=0
    )


W = torch.ones(2, 3)
DIFFERENT = [
    ({"w": W, "b": W}, {"w": W}, {}, "1.pt'. Only checkpoints of one model can be averaged; of "
     "several floating dtypes, if dtype= (on the command line --dtype) says which the result "
     "gets."),
    ({"w": W, "b": W}, {"w": W}, {}, "'b' is torch.float32 [2, 3] in '"),
    ({"w": W}, {"w": W, "c": W}, {}, "0.pt', but torch.float32 [2, 3] in '"),
    ({"w": W}, {"w": W.t()}, {"dtype": torch.half}, "0.pt', but floating [3, 2] in '"),
    ({"w": W}, {"w": W.half()}, {}, "0.pt', but torch.float16 [2, 3] in '"),
    ({"w": W}, {"w": W.int()}, {"dtype": torch.half}, "0.pt', but torch.int32 [2, 3] in '"),
    ({"w": W.to(torch.float8_e4m3fn)}, {}, {}, "float8_e4m3fn, whose values mean nothing without"),
    ({"w": W.to(torch.complex128)}, {}, {}, "'w' cannot be written as safetensors (KeyError: "
     "torch.complex128)"),
    ({"w": W.to_sparse()}, {}, {}, "Save it as a plain tensor."),
    ({"n": 3}, {}, {}, "has tensors by name at the keys none, so which are the weights is unknown"),
    ({"ema": {"w": W}, "model": {"w": W, "v": W}}, {}, {}, "has tensors by name at the keys "
     "'model', 'ema', so which are the weights is unknown from key=None. Choose one by key= (on "
     "the command line --key)."),
    ({"model": {"w": W}}, {}, {"key": "ema"}, "is unknown from key='ema'."),
    ({"w": W}, {}, {"dtype": torch.int8}, "dtype must be one of torch.float64, torch.float32, "),
]  # fmt: skip


@pytest.mark.parametrize(("first", "second", "options", "text"), DIFFERENT)
def test_what_cannot_be_averaged(first, second, options, text, tmp_path) -> None:
    paths = [save(tmp_path, str(j), state) for j, state in enumerate((first, second or first))]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=re.escape(text)):
        merge(paths, out=tmp_path / "out", **options)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_wrong_paths(tmp_path) -> None:
    path = save(tmp_path, "a", {"w": W})
    with pytest.raises(ValueError, match=r"must be a list of paths, oldest first, got 'a.pt'"):
        merge("a.pt", out="out")
    with pytest.raises(ValueError, match=r"is one of the checkpoints. Write to another file."):
        merge([path], out=path)
    with pytest.raises(OSError, match=r"'.*no' is none that can be written into"):
        merge([path], out=tmp_path / "no" / "out")
    with pytest.raises(OSError, match=re.escape(f"'{tmp_path}' is a folder, or")):
        merge([path], out=tmp_path)
    with pytest.raises(ValueError, match=r"list.pt' has tensors by name at the keys none"):
        merge([path, save(tmp_path, "list", [W])], out=tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="gone"):
        merge([path, tmp_path / "gone.pt"], out=tmp_path / "out")
    (tmp_path / "bad.pt").write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        merge([path, tmp_path / "bad.pt"], out=tmp_path / "out")


def test_dtype_settles_checkpoints_of_several_dtypes(tmp_path) -> None:
    states = [{"w": torch.tensor([1.0]), "z": torch.tensor([1j])}]
    states.append({"w": torch.tensor([2.0]).bfloat16(), "z": torch.tensor([2 + 1j])})
    paths = [save(tmp_path, str(j), state) for j, state in enumerate(states)]
    merge(paths, out=tmp_path / "out", dtype=torch.float32)
    assert load(tmp_path / "out")["w"].tolist() == [1.5]
    assert load(tmp_path / "out")["z"].tolist() == [1 + 1j]


def test_keys_of_nested_checkpoints(tmp_path) -> None:
    model = nn.Linear(2, 2)
    ema = ModelEMA(model)
    state = {"model": model.state_dict(), "ema": ema.state_dict(), "epoch": 3}
    torch.save(state, tmp_path / "a.pt")
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(state, checkpoint_id=tmp_path / "b")
    for key in ("model", "ema.weights"):
        merge([tmp_path / "a.pt", tmp_path / "b"], out=tmp_path / "out", key=key)
        torch.testing.assert_close(load(tmp_path / "out"), dict(model.state_dict()))
    # One place only that has tensors, and the outermost one, whose key is ''.
    merge([save(tmp_path, "c", {"model": {"w": W}, "epoch": 3})], out=tmp_path / "out")
    merge([save(tmp_path, "d", {"w": W, "ema": {"w": 2 * W}})], out=tmp_path / "out", key="")
    assert load(tmp_path / "out")["w"].unique().tolist() == [1.0]


def test_a_tied_tensor_loads_under_each_of_its_names(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    safetensors.torch.save_model(model, str(tmp_path / "st"))
    merge([save(tmp_path, "pt", model.state_dict()), tmp_path / "st"], out=tmp_path / "out")
    torch.testing.assert_close(load(tmp_path / "out"), dict(model.state_dict()))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.uint16, torch.bool])
def test_integers_that_differ_are_warned_of(dtype, tmp_path) -> None:
    states = [
        {"packed": torch.tensor([j, 1]).to(dtype), "same": torch.tensor([1, 0]).to(dtype)}
        for j in range(2)
    ]
    paths = [save(tmp_path, str(j), state) for j, state in enumerate(states)]
    with pytest.warns(UserWarning, match=r"different integers in 'packed', which cannot be averag"):
        merge(paths, out=tmp_path / "out")
    assert load(tmp_path / "out")["packed"].tolist() == [1, 1]


def test_a_checkpoint_that_does_not_count_spoils_nothing(tmp_path) -> None:
    paths = [save(tmp_path, str(j), {"w": torch.tensor([value])}) for j, value in
             enumerate((float("inf"), 2.0))]  # fmt: skip
    merge(paths, [0, 1], out=tmp_path / "out")
    assert load(tmp_path / "out")["w"].tolist() == [2.0]


def test_files_of_the_old_format_and_folders_with_an_index(tmp_path) -> None:
    torch.save({"a": W, "b": 2 * W}, tmp_path / "old", _use_new_zipfile_serialization=False)
    folder = tmp_path / "pretrained"
    folder.mkdir()
    safetensors.torch.save_file({"a": 3 * W}, folder / "model-1.safetensors")
    safetensors.torch.save_file({"b": 4 * W}, folder / "model-2.safetensors")
    parts = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    merged = merge([tmp_path / "old", folder], out=tmp_path / "out")
    assert {name: tensor[0, 0].item() for name, tensor in load(tmp_path / "out").items()} == {
        "a": 2.0,
        "b": 3.0,
    }
    assert merged[1]["sha256"].keys() == set(parts.values())
