"""Files of weights: what is written comes back bit for bit, and what is damaged is noticed."""

import argparse
import io
import os
import pickle
import random
import stat
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from ema_triton.files import CHECKSUM, read, write_weights

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
    "odd names": {"": torch.ones(1), "ä.☃ '\n": torch.zeros(2), "ema_triton.crc32": torch.ones(3)},
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
    write_weights(path, TENSORS[kind], {"updates": "7", "format": "pt"})
    content = read(path)
    assert_same(content.state, TENSORS[kind])
    assert content.metadata == {"updates": "7", "format": "pt"}
    assert [*tmp_path.iterdir()] == [path]
    assert all(tensor.is_contiguous() for tensor in content.state.values())


@pytest.mark.gpu
def test_tensors_on_a_gpu(tmp_path: Path) -> None:
    tied = BUFFER.cuda()
    write_weights(tmp_path / "w", {"a": tied, "b": tied, "c": tied[2:4]}, {})
    assert_same(read(tmp_path / "w").state, {"a": BUFFER, "b": BUFFER, "c": BUFFER[2:4]})


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.z = nn.Linear(16, 16)
        self.a = nn.Linear(16, 16)
        self.a.weight = self.z.weight
        self.a.bias = self.z.bias


def test_tied_weights_are_written_once_as_safetensors_does(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    write_weights(tmp_path / "ours", model.state_dict(), {"k": "v"})
    assert (tmp_path / "ours").stat().st_size < 16 * 17 * 4 + 600
    content = read(tmp_path / "ours")
    assert_same(content.state, model.state_dict())
    assert content.state["a.weight"] is content.state["z.weight"]
    assert content.metadata == {"k": "v"}
    safetensors.torch.load_model(other, tmp_path / "ours")
    assert_same(other.state_dict(), model.state_dict())
    safetensors.torch.save_model(model, tmp_path / "theirs", {"k": "v"})
    with (
        safetensors.safe_open(tmp_path / "ours", "pt") as ours,
        safetensors.safe_open(tmp_path / "theirs", "pt") as theirs,
    ):
        assert ours.keys() == theirs.keys()
        assert {**ours.metadata(), CHECKSUM: ""} == {**theirs.metadata(), CHECKSUM: ""}
    theirs = read(tmp_path / "theirs")
    assert_same(theirs.state, model.state_dict())
    assert theirs.metadata == {"k": "v"}


def test_tensors_without_elements_are_not_tied(tmp_path: Path) -> None:
    empty = torch.empty(0)
    write_weights(tmp_path / "w", {"a": empty, "b": empty}, {})
    assert safetensors.torch.load_file(tmp_path / "w").keys() == {"a", "b"}


def test_what_others_wrote_about_the_format_is_no_tied_name(tmp_path: Path) -> None:
    safetensors.torch.save_file({"pt": torch.ones(2)}, tmp_path / "w", {"format": "pt"})
    assert read(tmp_path / "w") == ({"pt": pytest.approx(torch.ones(2))}, {"format": "pt"})
    write_weights(tmp_path / "w", {"pt": torch.ones(2)}, {"format": "pt"})
    assert [*read(tmp_path / "w").state] == ["pt"]


REFUSED = {
    "'w' is torch.complex128, which safetensors": {"w": torch.ones(2, dtype=torch.complex128)},
    "'w' is a list, not a tensor": {"w": [1.0]},
    "'w' is on the meta device": {"w": torch.ones(2, device="meta")},
    "'w' is not dense": {"w": torch.eye(2).to_sparse()},
    "'w' is a UninitializedParameter": {"w": nn.LazyLinear(2).weight},
    "3 has a name": {3: torch.ones(2)},
    "'__metadata__' has a name": {"__metadata__": torch.ones(2)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_tensors_that_cannot_be_written(message: str, tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=message) as raised:
        write_weights(path, {"a": torch.ones(1), **REFUSED[message]}, {})
    assert "Nothing was written" in str(raised.value)
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_bytes() == b"old"


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:The PyTorch API of nested")
def test_what_only_looks_dense_cannot_be_written(tmp_path: Path) -> None:
    for tensor in (
        torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    ):
        with pytest.raises(ValueError, match="'w' is not dense"):
            write_weights(tmp_path / "w", {"w": tensor}, {})
    assert [*tmp_path.iterdir()] == []


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_complex32_cannot_be_written(tmp_path: Path) -> None:
    half = torch.ones(2, dtype=torch.complex32)
    for tensor in (half, half[:0], half.conj()):
        with pytest.raises(ValueError, match=r"'w' is torch\.complex32, which safetensors"):
            write_weights(tmp_path / "w", {"w": tensor}, {})
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    "metadata", [{CHECKSUM: "1"}, {"k": "w"}, {"z": "other"}, {"k": 3}, {3: "v"}]
)
def test_metadata_that_would_be_misread(metadata: dict, tmp_path: Path) -> None:
    one = torch.ones(2)
    with pytest.raises(ValueError, match=r"The metadata has .* Nothing was written"):
        write_weights(tmp_path / "w", {"w": one, "z": one}, metadata)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("name", [CHECKSUM, "format"])
def test_a_tied_tensor_named_as_other_metadata(name: str, tmp_path: Path) -> None:
    one = torch.ones(2)
    with pytest.raises(ValueError, match=rf"'{name}' is tied to 'a', .* Nothing was written"):
        write_weights(tmp_path / "w", {"a": one, name: one}, {})
    assert [*tmp_path.iterdir()] == []


class Broken(BaseException):
    pass


def fail(*_: object) -> None:
    raise Broken


FAILURES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the writing": lambda patch: patch.setattr("safetensors.torch.save_file", half_a_file),
    "the flush": lambda patch: patch.setattr("os.fsync", fail),
    "the renaming": lambda patch: patch.setattr("os.replace", fail),
}


def half_a_file(tensors: object, path: str, metadata: object) -> None:
    Path(path).write_bytes(b"half")
    raise Broken


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("old", [True, False])
def test_a_write_that_fails_leaves_what_was(
    failure: str, old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w"
    before = {"w": torch.zeros(3)}
    if old:
        write_weights(path, before, {})
    with monkeypatch.context() as patch:
        FAILURES[failure](patch)
        with pytest.raises(Broken):
            write_weights(path, {"w": torch.ones(3)}, {})
    assert [*tmp_path.iterdir()] == ([path] if old else [])
    if old:
        assert_same(read(path).state, before)
    write_weights(path, {"w": torch.ones(3)}, {})
    assert_same(read(path).state, {"w": torch.ones(3)})


def test_the_new_file_is_complete_when_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    replace, fsync = os.replace, os.fsync

    def checked(new: str, target: str) -> None:
        assert_same(read(new).state, {"w": torch.ones(3)})
        assert os.path.dirname(new) == str(tmp_path)
        steps.append("replace")
        replace(new, target)

    monkeypatch.setattr("os.fsync", lambda number: (steps.append("fsync"), fsync(number)))
    monkeypatch.setattr("os.replace", checked)
    write_weights(tmp_path / "w", {"w": torch.ones(3)}, {})
    assert steps == ["fsync", "replace"]


def test_a_folder_or_a_missing_one_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_weights(tmp_path / "folder", {"w": torch.ones(1)}, {})
    with pytest.raises(FileNotFoundError):
        write_weights(tmp_path / "missing" / "w", {"w": torch.ones(1)}, {})
    assert [*tmp_path.rglob("*")] == [tmp_path / "folder"]


def test_others_may_read_the_file_as_they_may_any_other(tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    write_weights(tmp_path / "w", {"w": torch.ones(1)}, {})
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("any", "w")]
    assert modes[0] == modes[1]


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "w")
    for _ in range(2):
        write_weights(tmp_path / "link", {"w": torch.ones(1)}, {})
        assert (tmp_path / "link").is_symlink()
        assert_same(read(tmp_path / "folder" / "w").state, {"w": torch.ones(1)})


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_weights(tmp_path / "w", {"w": torch.ones(1)}, {})
    torch.save({"w": torch.ones(1)}, tmp_path / "t")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for use in (lambda: write_weights(tmp_path / "w", {}, {}), lambda: read(tmp_path / "w")):
        with pytest.raises(ImportError, match="pip install safetensors"):
            use()
    assert_same(read(tmp_path / "t").state, {"w": torch.ones(1)})


@pytest.mark.parametrize("ending", ["safetensors", "pt", ""])
def test_files_are_told_by_their_content(ending: str, tmp_path: Path) -> None:
    weights = {"w": torch.randn(3), "n": torch.tensor(4)}
    path = tmp_path / f"weights.{ending}"
    write_weights(path, weights, {"k": "v"})
    assert_same(read(path).state, weights)
    safetensors.torch.save_file(weights, path)
    assert_same(read(str(path)).state, weights)
    for new_format in (True, False):
        torch.save({"nested": weights, "n": 3}, path, _use_new_zipfile_serialization=new_format)
        state, metadata = read(path)
        assert (state["n"], metadata) == (3, {})
        assert_same(state["nested"], weights)


def test_what_is_read_does_not_hang_on_the_file(tmp_path: Path) -> None:
    write_weights(tmp_path / "w", {"w": torch.ones(9999)}, {})
    state = read(tmp_path / "w").state
    with open(tmp_path / "w", "rb+") as file:
        file.write(b"\0" * file.seek(0, os.SEEK_END))
        file.truncate(0)
    assert_same(state, {"w": torch.ones(9999)})


def test_arguments_of_a_training_script_are_read(tmp_path: Path) -> None:
    """And whether the user allows them elsewhere is left as it was."""
    arguments = argparse.Namespace(model="m", lr=0.1)
    torch.save({"args": arguments}, tmp_path / "w")
    assert read(tmp_path / "w").state == {"args": arguments}
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert read(tmp_path / "w").state == {"args": arguments}
        assert argparse.Namespace in torch.serialization.get_safe_globals()


class Code:
    ran = False

    def __reduce__(self) -> tuple:
        return setattr, (Code, "ran", True)


def zipped(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def saved(state: object, **options: object) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, **options)
    return file.getvalue()


FOREIGN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "text": (b"weights: 3\n" * 9, "neither a safetensors file nor one of torch.save"),
    "json": (b'{"a": 1, "b": {"c": 2}}', "neither a safetensors file"),
    "json that looks like a header": (b'{"a": 1,{"b": 2}}', "not a safetensors file"),
    "png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(30), "neither a safetensors file"),
    "zeros": (bytes(100), "neither a safetensors file"),
    "random": (random.Random(0).randbytes(500), "neither a safetensors file"),
    "pickle": (pickle.dumps({"w": [1.0]}), "neither a safetensors file"),
    "pickle of code": (pickle.dumps(Code()), "neither a safetensors file"),
    "zip": (zipped(a=b"text"), "is a zip file of another kind"),
    "torchscript": (zipped(**{"m/data.pkl": b"", "m/constants.pkl": b""}), "a TorchScript archive"),
    "torch.save of code": (saved({"w": Code()}), "holds more than tensors and plain values"),
    "old torch.save of code": (
        saved({"w": Code()}, _use_new_zipfile_serialization=False),
        "neither a safetensors file",
    ),
    "torch.save of a module": (saved(nn.Linear(1, 1)), "holds more than tensors"),
    "safetensors of nothing": (b"\x02" + bytes(7) + b"{", "not a safetensors file"),
    "a header too long": (b"\xff" * 8 + b"{}", "not a safetensors file"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_files_of_other_kinds(kind: str, tmp_path: Path) -> None:
    content, message = FOREIGN[kind]
    path = tmp_path / "a file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read(path)
    text = str(raised.value)
    assert str(path) in text
    assert "ive " in text or "hand over" in text
    assert "\033" not in text
    assert "weights_only=False" not in text or kind.startswith("torch.save of")
    assert type(raised.value) is ValueError
    assert not Code.ran
    if kind not in ("empty", "zip", "torchscript"):
        assert not isinstance(raised.value.__cause__, (ValueError, type(None)))
    assert raised.value.__suppress_context__ or raised.value.__context__ is None


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder") as raised:
        read(tmp_path)
    assert isinstance(raised.value.__cause__, IsADirectoryError)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "missing")
    with pytest.raises(TypeError):
        read(0)


def test_running_out_of_memory_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "w")
    for error in (MemoryError, KeyboardInterrupt):
        monkeypatch.setattr(
            "torch.load", lambda *_, error=error, **__: (_ for _ in ()).throw(error)
        )
        with pytest.raises(error):
            read(tmp_path / "w")


WEIGHTS = {
    "layer.weight": torch.linspace(-1, 1, 6).reshape(2, 3),
    "layer.half": torch.linspace(0, 1, 5).bfloat16(),
    "layer.mask": torch.tensor([True, False]),
    "count": torch.tensor(17),
    "none": torch.empty(0, 2),
}
TIED = {**WEIGHTS, "another": WEIGHTS["layer.weight"]}


def our_file(path: Path) -> None:
    write_weights(path, TIED, {"updates": "7"})


def torch_file(path: Path) -> None:
    torch.save(TIED, path)


FORMATS = [our_file, torch_file]


@pytest.mark.parametrize("write", FORMATS)
def test_a_truncated_file_is_noticed(write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "w"
    write(path)
    whole = path.read_bytes()
    assert_same(read(path).state, TIED)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"(is empty|incomplete|damaged)"):
            read(path)


@pytest.mark.parametrize("write", FORMATS)
def test_a_flipped_bit_is_noticed_or_does_no_harm(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "w"
    write(path)
    whole = path.read_bytes()
    values = whole.find(bytes_of(WEIGHTS["layer.weight"]))
    assert values > 0
    draw = random.Random(0)
    harmless = 0
    for position in range(len(whole)):
        # Of the larger file every bit in a weight, else one of each byte.
        every = write is our_file or values <= position < values + 24
        for bit in range(8) if every else [draw.randrange(8)]:
            flipped = bytearray(whole)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                content = read(path)
            except ValueError as error:
                assert str(path) in str(error)  # noqa: PT017
            else:
                assert not values <= position < values + 24
                assert_same(content.state, TIED)
                harmless += 1
    # Of ours: a lost name of the checksum. Of torch.save: padding, times, names not looked for.
    assert harmless < (8 * len(CHECKSUM) if write is our_file else len(whole))


@pytest.mark.parametrize("write", FORMATS)
def test_many_flipped_bytes(write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "w"
    write(path)
    whole = path.read_bytes()
    draw = random.Random(1)
    for _ in range(500):
        damaged = bytearray(whole)
        start = draw.randrange(len(whole))
        for position in range(start, min(len(whole), start + draw.randrange(1, 200))):
            damaged[position] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            content = read(path)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:
            assert_same(content.state, TIED)


def flip_a_weight(path: Path) -> None:
    flipped = bytearray(path.read_bytes())
    flipped[flipped.find(bytes_of(WEIGHTS["layer.weight"])) + 2] ^= 1
    path.write_bytes(flipped)


def test_it_is_the_checksum_that_notices(tmp_path: Path) -> None:
    """Without it the flipped bit passes, in both formats."""
    path = tmp_path / "w"
    our_file(path)
    flip_a_weight(path)
    with pytest.raises(ValueError, match="is damaged: the checksum of its weights is"):
        read(path)
    safetensors.torch.save_file(WEIGHTS, path)
    flip_a_weight(path)
    assert not same(read(path).state["layer.weight"], WEIGHTS["layer.weight"])

    torch_file(path)
    flip_a_weight(path)
    with pytest.raises(ValueError, match=r"is damaged: '.*data/0' in it is not what was"):
        read(path)
    assert not same(torch.load(path)["layer.weight"], WEIGHTS["layer.weight"])


def test_a_torch_file_without_checksums(tmp_path: Path) -> None:
    path = tmp_path / "w"
    torch.serialization.set_crc32_options(False)
    try:
        torch_file(path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(read(path).state, TIED)
    flip_a_weight(path)
    assert not same(read(path).state["layer.weight"], WEIGHTS["layer.weight"])
    # What cannot be unpickled may be damaged, so there is no advice to trust it.
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"ctorch\n", b"ctarch\n"))
    with pytest.raises(ValueError, match=r"cannot be read, or it is damaged .*UnpicklingError"):
        read(path)


def test_a_lost_tied_name_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "w"
    our_file(path)
    whole = path.read_bytes()
    assert whole.count(b'"layer.weight":"another"') == 1
    for damaged in (b'"layer.veight":"another"', b'"layer.weight":"anothes"'):
        path.write_bytes(whole.replace(b'"layer.weight":"another"', damaged))
        with pytest.raises(ValueError, match="is damaged: the checksum"):
            read(path)


def test_a_weight_marked_as_a_folder_is_noticed(tmp_path: Path) -> None:
    """torch.load would leave its memory as it finds it."""
    path = tmp_path / "w"
    torch_file(path)
    flipped = bytearray(path.read_bytes())
    entry = flipped.find(b"data/0", flipped.find(b"PK\1\2")) - len("w/") - 46
    assert flipped[entry : entry + 4] == b"PK\1\2"
    flipped[entry + 38] ^= 0x10
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"is damaged: '.*data/0' in it is not what was"):
        read(path)
