"""Tools that tell tensors apart by their storage write all of an EMA's, each once."""

import copy
import functools
import io
import pickle
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_triton import ModelEMA
from tests.plain import PlainEMA, assert_same, move

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def library(name: str) -> ModuleType:
    """Import it, whatever it warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def layers() -> nn.Module:
    """20 tensors."""
    return nn.Sequential(*[nn.Linear(32, 32) for _ in range(10)])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight


class Kinds(nn.Module):
    """Every dtype, and shapes that are easily taken for another tensor's or for none."""

    def __init__(self) -> None:
        super().__init__()
        self.bf16 = nn.Parameter(torch.randn(5, 3).to(torch.bfloat16))
        self.fp16 = nn.Parameter(torch.randn(5, 3).to(torch.float16))
        self.fp64 = nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
        self.waves = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))
        self.phase = nn.Parameter(torch.randn((), dtype=torch.complex64))
        self.image = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
        self.turned = nn.Parameter(torch.randn(6, 5).t())
        self.scalar = nn.Parameter(torch.randn(()))
        self.one = nn.Parameter(torch.randn(1, 1, 1))
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.register_buffer("mean", torch.randn(3))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("mask", torch.tensor([True, False]))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "layers": layers,
    "layers in bf16": lambda: layers().to(torch.bfloat16),
    "tied": Tied,
    "kinds": Kinds,
}


def averaged(model: nn.Module, **options: Any) -> tuple[ModelEMA, dict[str, Tensor]]:
    """An EMA after three updates, and its weights, which are what plain torch makes of them."""
    ema = ModelEMA(model, **options)
    plain = PlainEMA(model, handle_buffers=options.get("handle_buffers", "copy"))
    for step in range(3):
        move(model, step)
        ema.update(0.3)
        plain.update(0.3)
    weights = ema.state_dict(clone=True)["weights"]
    plain.check(weights)
    online = model.state_dict()
    assert all(weights[name].dtype == value.dtype for name, value in online.items())
    return ema, weights


@functools.cache
def example(name: str, backend: str) -> tuple[ModelEMA, dict[str, Tensor]]:
    """One for all tools, which change nothing."""
    torch.manual_seed(1)
    return averaged(MODELS[name]().to(DEVICE), backend=backend)


def blank(module: nn.Module) -> nn.Module:
    """A model of its own with other values."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        for tensor in [*other.parameters(), *other.buffers()]:
            tensor.zero_()
    return other


@pytest.fixture
def _no_accelerator() -> Iterator[None]:
    """Its state belongs to the process."""
    yield
    if "accelerate.state" in sys.modules:
        state = sys.modules["accelerate.state"]
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


def accelerator() -> Any:
    return library("accelerate").Accelerator(cpu=DEVICE.type == "cpu")


def accelerate_state(module: nn.Module, folder: Path, action: str) -> None:
    prepared = accelerator()
    prepared.prepare(module)
    getattr(prepared, action)(str(folder))


def load_sharded(module: nn.Module, folder: Path) -> None:
    # A tied tensor is written once; the index tells its other names, and the loader warns of them.
    found = library("huggingface_hub").load_torch_model(module, folder, strict=False)
    assert found.unexpected_keys == []
    assert {*found.missing_keys} <= {"head.weight"}


FILE = "model.safetensors"
# How to write a module into a folder, and to read it from there.
TOOLS: dict[
    str, tuple[Callable[[nn.Module, Path], object], Callable[[nn.Module, Path], object]]
] = {
    "safetensors' save_model": (
        lambda m, f: library("safetensors.torch").save_model(m, f / FILE),
        lambda m, f: library("safetensors.torch").load_model(m, f / FILE),
    ),
    "accelerate's save_model": (
        lambda m, f: accelerator().save_model(m, f),
        lambda m, f: library("accelerate").load_checkpoint_in_model(m, f, strict=True),
    ),
    "accelerate's save_model in shards": (
        lambda m, f: accelerator().save_model(m, f, max_shard_size="10KB"),
        lambda m, f: library("accelerate").load_checkpoint_in_model(m, f, strict=True),
    ),
    "accelerate's save": (
        lambda m, f: library("accelerate.utils").save(
            m.state_dict(), f / FILE, safe_serialization=True
        ),
        lambda m, f: library("safetensors.torch").load_model(m, f / FILE),
    ),
    "accelerate's save_state": (
        lambda m, f: accelerate_state(m, f, "save_state"),
        lambda m, f: accelerate_state(m, f, "load_state"),
    ),
    "huggingface_hub's save_torch_model": (
        lambda m, f: library("huggingface_hub").save_torch_model(m, f, max_shard_size="10KB"),
        load_sharded,
    ),
    "huggingface_hub's save_torch_model in small shards": (
        lambda m, f: library("huggingface_hub").save_torch_model(m, f, max_shard_size="1KB"),
        load_sharded,
    ),
    "torch.save": (
        lambda m, f: torch.save(m.state_dict(), f / "model.pt"),
        lambda m, f: m.load_state_dict(torch.load(f / "model.pt", weights_only=True)),
    ),
}
# Some tensors of each model that must have been read.
SOME = {"0.weight", "9.bias", "embedding.weight", "head.weight", "bf16", "image.weight", "scalar"}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("_no_accelerator")
def test_a_tool_writes_what_it_writes_of_a_plain_model(
    name: str, tool: str, backend: str, tmp_path: Path
) -> None:
    write, read = TOOLS[tool]
    ema, truth = example(name, backend)
    assert_same(ema.ema_model.state_dict(), truth)
    places = [value.data_ptr() for value in ema.ema_model.state_dict().values()]
    plain = blank(ema.model)
    plain.load_state_dict(truth)
    folders = [tmp_path / "ema", tmp_path / "plain"]
    for module, folder in zip((ema.ema_model, plain), folders, strict=True):
        folder.mkdir()
        write(module, folder)
    loaded = blank(ema.model)
    assert not any(torch.equal(loaded.state_dict()[key], truth[key]) for key in SOME & {*truth})
    read(loaded, folders[0])
    assert_same(loaded.state_dict(), truth)
    sizes, expected = ({path.name: path.stat().st_size for path in f.iterdir()} for f in folders)
    assert sizes == expected
    # Saving has changed nothing.
    assert_same(ema.ema_model.state_dict(), truth)
    assert places == [value.data_ptr() for value in ema.ema_model.state_dict().values()]


def test_the_20_tensors_of_ten_layers(tmp_path: Path) -> None:
    accelerate, hub = library("accelerate"), library("huggingface_hub")
    files = library("safetensors.torch")
    ema, truth = averaged(layers())
    assert len(truth) == 20
    accelerate.utils.save(ema.ema_model.state_dict(), tmp_path / "a", safe_serialization=True)
    files.save_model(ema.ema_model, tmp_path / "b")
    for name in "ab":
        assert_same(files.load_file(tmp_path / name), truth)
    (tmp_path / "c").mkdir()
    hub.save_torch_model(ema.ema_model, tmp_path / "c", max_shard_size="10KB")
    shards = [files.load_file(path) for path in (tmp_path / "c").glob("*.safetensors")]
    assert len(shards) == 5
    assert sum(map(len, shards)) == 20
    assert_same({name: value for shard in shards for name, value in shard.items()}, truth)


@pytest.mark.parametrize("as_module", [True, False])
def test_an_exact_ema_in_files_of_its_parts(as_module: bool, backend: str, tmp_path: Path) -> None:
    """Weights and residuals, each tensor once, and nothing rounded."""
    save = library("accelerate.utils").save
    load = library("safetensors.torch").load_file
    model = layers().to(DEVICE, torch.bfloat16)
    ema, before = averaged(model, as_module=as_module, backend=backend)
    state = ema.state_dict()
    assert len(state["weights"]) == len(state["residuals"]) == 20
    for part in ("weights", "residuals"):
        save(state[part], tmp_path / part, safe_serialization=True)
        assert_same(load(tmp_path / part), state[part])
    read = {part: load(tmp_path / part) for part in ("weights", "residuals")}
    other = ModelEMA(copy.deepcopy(model), as_module=as_module, backend=backend)
    other.load_state_dict({**state, **read})
    for average in (ema, other):
        average.update(0.3)
    assert_same(other.state_dict()["weights"], ema.state_dict()["weights"])
    assert_same(other.state_dict()["residuals"], ema.state_dict()["residuals"])
    assert not torch.equal(other.state_dict()["weights"]["0.weight"], before["0.weight"])


def assert_own_storages(tensors: dict[str, Tensor]) -> None:
    """Each tensor with elements is the whole of a storage that no other one has."""
    owners: dict[int, str] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        assert (tensor.storage_offset(), storage.nbytes()) == (0, tensor.nbytes), name
        if tensor.nbytes and name != "head.weight":
            assert owners.setdefault(storage.data_ptr(), name) == name
    if "head.weight" in tensors:
        assert owners[tensors["head.weight"].data_ptr()] == "embedding.weight"


def turn(model: nn.Module) -> None:
    """Other strides."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.t().contiguous().t()


MOVES: dict[str, Callable[[ModelEMA], object]] = {
    "nothing": lambda ema: None,
    "the online model cast": lambda ema: ema.model.double(),
    "the online model turned": lambda ema: turn(ema.model),
    "its state loaded": lambda ema: ema.load_state_dict(ema.state_dict(clone=True)),
    "synced": lambda ema: ema.sync(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda ema: pickle.loads(pickle.dumps(ema)),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("as_module", [True, False])
@pytest.mark.parametrize("handle_buffers", ["copy", "update"])
@pytest.mark.parametrize("name", MODELS)
def test_each_tensor_and_each_residual_has_a_storage_of_its_own(
    name: str, handle_buffers: str, as_module: bool, move: str
) -> None:
    torch.manual_seed(1)
    ema, truth = averaged(MODELS[name](), handle_buffers=handle_buffers, as_module=as_module)
    moved = MOVES[move](ema)
    ema = moved if isinstance(moved, ModelEMA) else ema
    for momentum in (None, 0.0):
        if momentum is not None:
            ema.update(momentum)
        state = ema.state_dict()
        assert_own_storages(state["weights"])
        assert_own_storages(state["residuals"])
        if move != "synced":
            assert_same(state["weights"], truth)
        if as_module:
            assert_own_storages(ema.ema_model.state_dict())
            assert_same(ema.ema_model.state_dict(), state["weights"])


@pytest.mark.parametrize("name", MODELS)
def test_ema_tensors_have_the_online_tensors_strides(name: str) -> None:
    ema, _ = averaged(MODELS[name]())
    online = ema.model.state_dict()
    for key, tensor in ema.ema_model.state_dict().items():
        assert tensor.stride() == online[key].stride(), key


@pytest.mark.parametrize("name", MODELS)
def test_tensors_built_in_inference_mode(name: str) -> None:
    model = MODELS[name]()
    with torch.inference_mode():
        ema = ModelEMA(model)
    assert_own_storages(ema.ema_model.state_dict())
    assert_own_storages(ema.state_dict()["residuals"])
    ema.update(0.3)
    assert_same(ema.ema_model.state_dict(), model.state_dict())


def saved_bytes(thing: object) -> int:
    file = io.BytesIO()
    torch.save(thing, file)
    return len(file.getvalue())


@pytest.mark.parametrize("name", ["layers", "layers in bf16"])
def test_saving_a_part_writes_as_much_as_of_a_plain_model(name: str) -> None:
    ema, truth = averaged(MODELS[name]())
    plain = blank(ema.model).requires_grad_(False).eval()
    plain.load_state_dict(truth)
    for part in (
        lambda module: module[3],
        lambda module: module[3].state_dict(),
        lambda module: module[3].weight,
        lambda module: module[3].bias.data,
        lambda module: module[2:4],
        lambda module: {"best": module[9].weight[:]},
    ):
        assert saved_bytes(part(ema.ema_model)) == saved_bytes(part(plain))
    state = ema.state_dict()
    for tensor in (state["weights"]["3.weight"], *state["residuals"].values()):
        assert saved_bytes(tensor) == saved_bytes(tensor.clone())


def test_pytorch_model_hub_mixin(tmp_path: Path) -> None:
    hub = library("huggingface_hub")

    class Net(nn.Module, hub.PyTorchModelHubMixin):
        def __init__(self, width: int, tied: bool) -> None:
            super().__init__()
            self.body = nn.Linear(width, width)
            self.head = nn.Linear(width, width)
            if tied:
                self.head.weight = self.body.weight

    for tied in (False, True):
        ema, truth = averaged(Net(width=7, tied=tied))
        ema.ema_model.save_pretrained(tmp_path)
        assert_same(Net.from_pretrained(tmp_path).state_dict(), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_diffusers_save_pretrained(dtype: torch.dtype, tmp_path: Path) -> None:
    diffusers = library("diffusers")
    model = diffusers.UNet2DModel(
        sample_size=4,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    ema, truth = averaged(model.to(dtype, memory_format=torch.channels_last))
    ema.ema_model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    loaded = diffusers.UNet2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    assert_same(loaded.state_dict(), truth)


SMALL = {
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("LlamaConfig", {"tie_word_embeddings": True}),
    "BertForMaskedLM": ("BertConfig", {}),
    "GPT2LMHeadModel": ("GPT2Config", {"n_inner": 16}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_save_pretrained(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    transformers = library("transformers")
    config, more = TRANSFORMERS[name]
    kind = getattr(transformers, name)
    model = kind(getattr(transformers, config)(**SMALL, **more)).to(dtype)
    tensors = {*model.state_dict(keep_vars=True).values()}
    assert len(tensors) < len(model.state_dict())  # some are tied
    ema, truth = averaged(model)
    ema.ema_model.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    loaded = kind.from_pretrained(tmp_path, dtype=dtype)
    assert_same(loaded.state_dict(), truth)


@pytest.mark.usefixtures("_no_accelerator")
def test_an_ema_registered_with_accelerate_goes_on(tmp_path: Path) -> None:
    library("accelerate")
    model = layers().to(DEVICE, torch.bfloat16)
    ema, truth = averaged(model)
    saving = accelerator()
    saving.register_for_checkpointing(ema)
    saving.save_state(str(tmp_path))
    other = ModelEMA(blank(model))
    loading = accelerator()
    loading.register_for_checkpointing(other)
    loading.load_state(str(tmp_path))
    assert other.update_index == 3
    for part in ("weights", "residuals"):
        assert_same(other.state_dict()[part], ema.state_dict()[part])
    assert_same(other.ema_model.state_dict(), truth)


@pytest.mark.skipif(
    shutil.which((sysconfig.get_config_var("CXX") or "g++").split()[0]) is None,
    reason="AOTInductor needs a C++ compiler",
)
# Warnings of torch's exporter and compiler.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_aotinductor_package_has_each_tensor_once(tmp_path: Path) -> None:
    from torch._inductor.utils import fresh_cache

    ema, truth = averaged(layers())
    plain = blank(ema.model).requires_grad_(False).eval()
    plain.load_state_dict(truth)
    packages = []
    for name, module in (("ema", ema.ema_model), ("plain", plain)):
        (tmp_path / name).mkdir()
        # A package of sources and weights: compiling the sources takes 5 seconds each.
        with torch.no_grad(), fresh_cache():
            path = torch._inductor.aoti_compile_and_package(
                torch.export.export(module, (torch.ones(2, 32),)),
                package_path=str(tmp_path / name / "model.pt2"),
                inductor_configs={
                    "compile_threads": 1,
                    "cpp_cache_precompile_headers": False,
                    "aot_inductor.package_cpp_only": True,
                },
            )
        packages.append(Path(path).read_bytes())  # a zip file that compresses nothing
    of_ema, of_plain = packages
    assert len(of_ema) == len(of_plain)
    for package in packages:
        assert [package.count(value.numpy().tobytes()) for value in truth.values()] == [1] * 20
