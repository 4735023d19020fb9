"""Files of weights: what is written comes back bit for bit; what cannot be read is one error."""

import argparse
import io
import os
import pickle
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("safetensors")

import safetensors.torch

from ema_triton import ModelEMA
from ema_triton.checkpoint.interop import read_file, write_safetensors

BUFFER = torch.arange(24.0)
MATRIX = torch.arange(6.0).reshape(2, 3)
SQUARE = torch.arange(9.0).reshape(3, 3)
COMPLEX = torch.tensor([1 + 2j, -3j])
TENSORS = {
    "views of one buffer": {"a": BUFFER[:8].view(2, 4), "b": BUFFER[8:20], "c": BUFFER[20]},
    "overlapping views": {"a": BUFFER[:8], "b": BUFFER[4:12], "c": BUFFER[6:6], "d": BUFFER[8:]},
    "a view in a view": {"a": BUFFER, "b": BUFFER[2:4], "c": BUFFER[10:12]},
    "channels_last": {
        "w": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "b": torch.ones(2),
    },
    "one memory, seen differently": {
        "a": SQUARE,
        "across": SQUARE.t(),
        "bits": SQUARE.view(torch.int32),
        "flat": SQUARE.view(-1),
        "complex": COMPLEX,
        "conjugate": COMPLEX.conj(),
    },
    "strides": {"t": MATRIX.t(), "gaps": BUFFER[::3], "one value": torch.ones(1).expand(3, 2)},
    "bf16, fp16, fp64": {
        str(dtype): torch.tensor([1.5, -0.0, float("inf"), float("nan")], dtype=dtype)
        for dtype in (torch.bfloat16, torch.float16, torch.float64)
    },
    "bool, int, complex64": {
        "bool": torch.tensor([True, False]),
        "complex": torch.tensor([1 + 2j, -3j]),
        **{
            str(dtype): torch.tensor([1, 0, 7], dtype=dtype)
            for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
        },
    },
    "lazy views": {
        "conj": torch.tensor([1 + 2j]).conj(),
        "neg": torch.tensor([1 + 2j]).conj().imag,
    },
    "no dimensions, no elements": {
        "0-d": torch.tensor(3.5),
        "empty": torch.empty(0),
        "empty too": torch.empty(2, 0, 3, dtype=torch.int64),
    },
    "odd names": {"": torch.ones(1), "ä.☃ '\n": torch.zeros(2), "format": torch.ones(3)},
    "a parameter": {"w": nn.Parameter(torch.ones(2))},
    "nothing": {},
}


def assert_same(found: object, expected: dict[str, Tensor]) -> None:
    assert isinstance(found, dict)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same(found[name], tensor), name


def same(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape, one.device.type) != (other.dtype, other.shape, "cpu"):
        return False
    return bytes_of(one) == bytes_of(other)


def bytes_of(tensor: Tensor) -> bytes:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    flat.copy_(tensor.detach().reshape(-1))
    return bytes(flat.view(torch.uint8).tolist())


@pytest.mark.parametrize("kind", TENSORS)
def test_what_is_written_is_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    write_safetensors(path, TENSORS[kind], 7)
    state = read_file(path)
    assert_same(state, TENSORS[kind])
    assert metadata_of(path) == {"update_index": "7", "format": "pt"}
    assert [*tmp_path.iterdir()] == [path]
    assert all(tensor.is_contiguous() for tensor in state.values())


def metadata_of(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.gpu
def test_tensors_on_a_gpu(tmp_path: Path) -> None:
    tied = BUFFER.cuda()
    write_safetensors(tmp_path / "w", {"a": tied, "b": tied, "c": tied[2:4]}, 0)
    assert_same(read_file(tmp_path / "w"), {"a": BUFFER, "b": BUFFER, "c": BUFFER[2:4]})


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.z = nn.Linear(16, 16)
        self.a = nn.Linear(16, 16)
        self.a.weight = self.z.weight
        self.a.bias = self.z.bias


def test_tied_weights_are_written_once_as_safetensors_does(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    write_safetensors(tmp_path / "ours", model.state_dict(), 3)
    assert (tmp_path / "ours").stat().st_size < 16 * 17 * 4 + 600
    state = read_file(tmp_path / "ours")
    assert_same(state, model.state_dict())
    assert state["a.weight"] is state["z.weight"]
    safetensors.torch.load_model(other, tmp_path / "ours")
    assert_same(other.state_dict(), model.state_dict())
    told = {"format": "pt", "update_index": "3"}
    safetensors.torch.save_model(model, tmp_path / "theirs", told)
    with (
        safetensors.safe_open(tmp_path / "ours", "pt") as ours,
        safetensors.safe_open(tmp_path / "theirs", "pt") as theirs,
    ):
        assert ours.keys() == theirs.keys()
        assert ours.metadata() == theirs.metadata()
    assert_same(read_file(tmp_path / "theirs"), model.state_dict())


def test_tensors_without_elements_are_not_tied(tmp_path: Path) -> None:
    empty = torch.empty(0)
    write_safetensors(tmp_path / "w", {"a": empty, "b": empty}, 0)
    assert safetensors.torch.load_file(tmp_path / "w").keys() == {"a", "b"}


@pytest.mark.parametrize("name", ["pt", "3"])
def test_the_other_metadata_is_no_tied_name(name: str, tmp_path: Path) -> None:
    told = {"format": "pt", "update_index": "3"}
    safetensors.torch.save_file({name: torch.ones(2)}, tmp_path / "w", told)
    assert_same(read_file(tmp_path / "w"), {name: torch.ones(2)})
    write_safetensors(tmp_path / "w", {name: torch.ones(2)}, 3)
    assert metadata_of(tmp_path / "w") == told
    assert_same(read_file(tmp_path / "w"), {name: torch.ones(2)})


@pytest.mark.parametrize("name", ["format", "update_index"])
def test_a_tied_tensor_named_as_other_metadata_is_written_again(name: str, tmp_path: Path) -> None:
    one = torch.ones(2)
    write_safetensors(tmp_path / "w", {"a": one, name: one, "z": one}, 3)
    assert_same(read_file(tmp_path / "w"), {"a": one, name: one, "z": one})
    assert metadata_of(tmp_path / "w") == {"format": "pt", "update_index": "3", "z": "a"}
    assert safetensors.torch.load_file(tmp_path / "w").keys() == {"a", name}


REFUSED = {
    r"KeyError: torch\.complex128": torch.ones(2, dtype=torch.complex128),
    "'list' object has no attribute": [1.0],
    "Cannot copy out of meta tensor": torch.ones(2, device="meta"),
    "sparse tensors": torch.eye(2).to_sparse(),
    "uninitialized parameter": nn.LazyLinear(2).weight,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_tensors_that_cannot_be_written(reason: str, tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=f"'w' cannot be written as safetensors.*{reason}") as info:
        write_safetensors(path, {"a": torch.ones(1), "w": REFUSED[reason]}, 0)
    assert "Nothing was written. Leave it out or convert it" in str(info.value)
    assert info.value.__cause__ is not None
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_bytes() == b"old"


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:The PyTorch API of nested")
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_what_only_looks_dense_cannot_be_written(tmp_path: Path) -> None:
    half = torch.ones(2, dtype=torch.complex32)
    for tensor in (
        torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        *(half, half[:0], half.conj()),
    ):
        with pytest.raises(ValueError, match="'w' cannot be written as safetensors"):
            write_safetensors(tmp_path / "w", {"w": tensor}, 0)
    assert [*tmp_path.iterdir()] == []


class Broken(BaseException):
    pass


def fail(*_: object) -> None:
    raise Broken


FAILURES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the writing": lambda patch: patch.setattr(torch.Tensor, "contiguous", fail),
    "the flush": lambda patch: patch.setattr("os.fsync", fail),
    "the renaming": lambda patch: patch.setattr("os.replace", fail),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("old", [True, False])
def test_a_write_that_fails_leaves_what_was(
    failure: str, old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w"
    before = {"w": torch.zeros(3)}
    if old:
        write_safetensors(path, before, 0)
    with monkeypatch.context() as patch:
        FAILURES[failure](patch)
        with pytest.raises(Broken):
            write_safetensors(path, {"w": torch.ones(3)}, 0)
    assert [*tmp_path.iterdir()] == ([path] if old else [])
    if old:
        assert_same(read_file(path), before)
    write_safetensors(path, {"w": torch.ones(3)}, 0)
    assert_same(read_file(path), {"w": torch.ones(3)})


def test_the_new_file_is_complete_when_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    replace, fsync = os.replace, os.fsync

    def checked(new: str, target: str) -> None:
        assert_same(read_file(new), {"w": torch.ones(3)})
        assert Path(new).parent.parent == tmp_path  # one file system
        steps.append("replace")
        replace(new, target)

    monkeypatch.setattr("os.fsync", lambda number: (steps.append("fsync"), fsync(number)))
    monkeypatch.setattr("os.replace", checked)
    write_safetensors(tmp_path / "w", {"w": torch.ones(3)}, 0)
    assert steps == ["fsync", "replace"]


def test_a_folder_or_a_missing_one_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_safetensors(tmp_path / "folder", {"w": torch.ones(1)}, 0)
    with pytest.raises(FileNotFoundError):
        write_safetensors(tmp_path / "missing" / "w", {"w": torch.ones(1)}, 0)
    assert [*tmp_path.rglob("*")] == [tmp_path / "folder"]


def test_others_may_read_the_file_as_they_may_any_other(tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    write_safetensors(tmp_path / "w", {"w": torch.ones(1)}, 0)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("any", "w")]
    assert modes[0] == modes[1]


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "w")
    for _ in range(2):
        write_safetensors(tmp_path / "link", {"w": torch.ones(1)}, 0)
        assert (tmp_path / "link").is_symlink()
        assert_same(read_file(tmp_path / "folder" / "w"), {"w": torch.ones(1)})


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_safetensors(tmp_path / "w", {"w": torch.ones(1)}, 0)
    torch.save({"w": torch.ones(1)}, tmp_path / "t")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for use in (
        lambda: write_safetensors(tmp_path / "w", {}, 0),
        lambda: read_file(tmp_path / "w"),
    ):
        with pytest.raises(ImportError, match="pip install safetensors"):
            use()
    assert_same(read_file(tmp_path / "t"), {"w": torch.ones(1)})


@pytest.mark.parametrize("ending", ["safetensors", "pt", ""])
def test_files_are_told_by_their_content(ending: str, tmp_path: Path) -> None:
    weights = {"w": torch.randn(3), "n": torch.tensor(4)}
    path = tmp_path / f"weights.{ending}"
    write_safetensors(path, weights, 0)
    assert_same(read_file(path), weights)
    safetensors.torch.save_file(weights, path)
    assert_same(read_file(str(path)), weights)
    for new_format in (True, False):
        torch.save({"nested": weights, "n": 3}, path, _use_new_zipfile_serialization=new_format)
        state = read_file(path)
        assert state["n"] == 3
        assert_same(state["nested"], weights)


def test_what_is_read_does_not_hang_on_the_file(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "w", {"w": torch.ones(9999)}, 0)
    state = read_file(tmp_path / "w")
    with open(tmp_path / "w", "rb+") as file:
        file.write(b"\0" * file.seek(0, os.SEEK_END))
        file.truncate(0)
    assert_same(state, {"w": torch.ones(9999)})


def test_arguments_of_a_training_script_are_read(tmp_path: Path) -> None:
    """And whether the user allows them elsewhere is left as it was."""
    arguments = argparse.Namespace(model="m", lr=0.1)
    torch.save({"args": arguments}, tmp_path / "w")
    assert read_file(tmp_path / "w") == {"args": arguments}
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert read_file(tmp_path / "w") == {"args": arguments}
        assert argparse.Namespace in torch.serialization.get_safe_globals()


class Code:
    ran = False

    def __reduce__(self) -> tuple:
        return setattr, (Code, "ran", True)


def saved(state: object, **options: object) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, **options)
    return file.getvalue()


WEIGHTS = {
    "weight": torch.linspace(-1, 1, 6).reshape(2, 3),
    "bias": torch.linspace(0, 1, 2),
}
SAFETENSORS, TORCH = safetensors.torch.save(WEIGHTS), saved(WEIGHTS)
UNREADABLE = {
    "empty": b"",
    "text": b"weights: 3\n" * 9,
    "zeros": bytes(100),
    "a zip's beginning": b"PK\3\4 and no more",
    "pickled values": pickle.dumps({"weight": [1.0]}),
    "pickled code": pickle.dumps(Code()),
    "torch.save of code": saved({"weight": Code()}),
    "old torch.save of code": saved({"weight": Code()}, _use_new_zipfile_serialization=False),
    "torch.save of a module": saved(nn.Linear(3, 2)),
    "a header cut off": SAFETENSORS[:20],
    "a header too long": b"\xff" * 8 + b"{}",
    "safetensors cut off": SAFETENSORS[:-1],
    "torch.save cut off": TORCH[: len(TORCH) // 2],
    "old torch.save cut off": saved(WEIGHTS, _use_new_zipfile_serialization=False)[:-1],
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_is_one_error_with_the_path(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a file"
    path.write_bytes(UNREADABLE[kind])
    model = nn.Linear(3, 2)
    ema = ModelEMA(model)
    model.weight.data.add_(1)
    ema.update(0.3)
    before = ema.state_dict(clone=True)
    with pytest.raises(ValueError, match="No weights can be read from") as raised:
        ema.load_weights(path)
    text = str(raised.value)
    assert f"'{path}' ({type(raised.value.__cause__).__name__}): it is damaged or incom" in text
    assert text.endswith("Give another copy of the file, or a dict of its weights.")
    assert not Code.ran
    assert_same(ema.state_dict()["weights"], before["weights"])
    assert ema.update_index == 1


def test_what_is_readable_is_loaded(tmp_path: Path) -> None:
    """The negative control: the same content, whole."""
    for content in (SAFETENSORS, TORCH):
        (tmp_path / "a file").write_bytes(content)
        ema = ModelEMA(nn.Linear(3, 2))
        ema.load_weights(tmp_path / "a file")
        assert_same(ema.state_dict()["weights"], WEIGHTS)
    pickle.loads(UNREADABLE["pickled code"])
    assert Code.ran
    Code.ran = False


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        read_file(tmp_path)
    with pytest.raises(FileNotFoundError, match="missing"):
        read_file(tmp_path / "missing")
    with pytest.raises(TypeError):
        read_file(0)


def test_running_out_of_memory_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "w")
    for error in (MemoryError, KeyboardInterrupt):
        monkeypatch.setattr(
            "torch.load", lambda *_, error=error, **__: (_ for _ in ()).throw(error)
        )
        with pytest.raises(error):
            read_file(tmp_path / "w")
