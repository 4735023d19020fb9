"""Folders that `save_pretrained` wrote: diffusers' `EMAModel` with its step, and any model's."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ema_triton import ModelEMA
from ema_triton.checkpoint.interop import read_path
from tests.plain import assert_same

files = pytest.importorskip("safetensors.torch")

NAME = "diffusion_pytorch_model"
CONFIG = {  # of diffusers 0.42
    "_class_name": "Net",
    "_diffusers_version": "0.42.1",
    "decay": 0.9999,
    "inv_gamma": 1.0,
    "min_decay": 0.0,
    "optimization_step": 7,
    "power": 0.6666666666666666,
    "update_after_step": 0,
    "use_ema_warmup": False,
}
COUNTS = (
    "The state was loaded; but diffusers' EMAModel counts 7 updates: set update_index to go on "
    "with a schedule from there."
)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))


def filled(value: float) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, value) for name, tensor in net().state_dict().items()}


def write(folder: Path, kind: str, config: Any = CONFIG, name: str = NAME) -> dict[str, Any]:
    """A folder of this kind; what is in it."""
    folder.mkdir(exist_ok=True)
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / "config.json").write_text(text)
    weights = filled(2.0)
    ending = "bin" if "bin" in kind else "safetensors"

    def save(part: dict[str, torch.Tensor], file: str) -> None:
        if ending == "bin":
            torch.save(part, folder / file)
        else:
            files.save_file(part, folder / file, {"format": "pt"})

    if "sharded" in kind:
        shards = {f"{name}-0000{n}-of-00002.{ending}": [f"{n - 1}.{key}" for key in
                  ("weight", "bias")] for n in (1, 2)}  # fmt: skip
        for file, names in shards.items():
            save({key: weights[key] for key in names}, file)
        index = {"metadata": {"total_size": 1}, "weight_map": {
            key: file for file, names in shards.items() for key in names}}  # fmt: skip
        (folder / f"{name}.{ending}.index.json").write_text(json.dumps(index, indent=2))
    else:
        save(weights, f"{name}.{ending}")
    return weights


KINDS = ["safetensors", "sharded safetensors", "bin", "sharded bin"]


@pytest.mark.parametrize("as_module", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_read_with_its_step(kind: str, as_module: bool, tmp_path: Path) -> None:
    weights = write(tmp_path / "unet_ema", kind)
    for path in (tmp_path / "unet_ema", str(tmp_path / "unet_ema") + "/"):
        ema = ModelEMA(net(), as_module=as_module)
        ema.update_index = 3
        with pytest.warns(UserWarning, match=f"^{re.escape(COUNTS)}$"):
            ema.load_weights(path)
        assert_same(ema.state_dict()["weights"], weights)
        assert ema.update_index == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_in_such_a_folder_has_the_step_too(kind: str, tmp_path: Path) -> None:
    weights = write(tmp_path, kind)
    ending = ".index.json" if "sharded" in kind else ""
    file = tmp_path / f"{NAME}.{kind.split()[-1]}{ending}"
    ema = ModelEMA(net())
    with pytest.warns(UserWarning, match="EMAModel counts 7 updates"):
        ema.load_weights(file)
    assert_same(ema.state_dict()["weights"], weights)


@pytest.mark.parametrize(
    "config",
    [None, {}, {"optimization_step": None}, {"optimization_step": 0}, {"optimization_step": -3},
     {"optimization_step": "7"}, {"optimization_step": True}, "{no json", "[7]", "\udcff"[:0]],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["safetensors", "sharded bin"])
def test_without_a_step_the_weights_are_read_all_the_same(
    kind: str, config: Any, tmp_path: Path
) -> None:
    weights = write(tmp_path, kind, config)
    ema = ModelEMA(net())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ema.load_weights(tmp_path)
    assert_same(ema.state_dict()["weights"], weights)


def test_a_file_of_another_name_is_not_diffusers(tmp_path: Path) -> None:
    """What else lies beside its config.json has no step."""
    write(tmp_path, "safetensors")
    source = ModelEMA(net())
    source.save_weights(tmp_path / "mine.safetensors")
    ema = ModelEMA(net())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ema.load_weights(tmp_path / "mine.safetensors")
    assert_same(ema.state_dict()["weights"], source.state_dict()["weights"])


@pytest.mark.parametrize(("name", "kind"), [("model", "safetensors"), ("pytorch_model", "bin"),
                                            ("model", "sharded safetensors"),
                                            ("pytorch_model", "sharded bin")])  # fmt: skip
def test_a_folder_of_transformers_is_read(name: str, kind: str, tmp_path: Path) -> None:
    weights = write(tmp_path, kind, {"model_type": "any"}, name)
    ema = ModelEMA(net())
    ema.load_weights(tmp_path)
    assert_same(ema.state_dict()["weights"], weights)


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    weights = write(tmp_path, "safetensors")
    torch.save(filled(9.0), tmp_path / f"{NAME}.bin")
    assert_same(read_path(tmp_path)[0], weights)


def test_a_folder_that_is_none_is_an_error_that_says_what_is_in_it(tmp_path: Path) -> None:
    write(tmp_path / "unet_ema", "safetensors")
    (tmp_path / "optimizer.bin").write_bytes(b"")
    ema = ModelEMA(net())
    before = ema.state_dict(clone=True)["weights"]
    text = (
        f"The folder '{tmp_path}' is none that save_pretrained wrote: there is no "
        "diffusion_pytorch_model.safetensors, model.safetensors, diffusion_pytorch_model.bin or "
        "pytorch_model.bin in it, nor an index of their parts, but 'optimizer.bin', 'unet_ema'. "
        "Give the folder with one of them (diffusers' scripts write unet_ema into each "
        "checkpoint), or a file of weights."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        ema.load_weights(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"nor an index of their parts, but nothing\."):
        ema.load_weights(tmp_path / "empty")
    assert_same(ema.state_dict()["weights"], before)


INDICES = ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}',
           '{"weight_map": {"a": ["x"]}}', '{"weight_map": {"a": "../other"}}',
           '{"weight_map": {}}', "\x00\xff"]  # fmt: skip


@pytest.mark.parametrize("index", INDICES)
def test_an_index_that_is_none_is_an_error(index: str, tmp_path: Path) -> None:
    files.save_file(filled(1.0), tmp_path / "other")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / f"{NAME}.safetensors.index.json").write_text(index)
    ema = ModelEMA(net())
    for path in (folder, folder / f"{NAME}.safetensors.index.json"):
        with pytest.raises(ValueError, match=r"index\.json' .*names no files beside it.*another c"):
            ema.load_weights(path)


def test_a_part_that_is_absent_or_damaged_is_named(tmp_path: Path) -> None:
    write(tmp_path, "sharded safetensors")
    part = tmp_path / f"{NAME}-00002-of-00002.safetensors"
    content = part.read_bytes()
    ema = ModelEMA(net())
    before = ema.state_dict(clone=True)["weights"]
    part.write_bytes(content[:40])
    with pytest.raises(ValueError, match="00002-of-00002"):
        ema.load_weights(tmp_path)
    torch.save([1], part)
    with pytest.raises(ValueError, match="00002-of-00002"):
        ema.load_weights(tmp_path)
    part.unlink()
    with pytest.raises(FileNotFoundError, match="00002-of-00002"):
        ema.load_weights(tmp_path)
    with pytest.raises(ValueError, match=r"'1\.weight' is missing, '1\.bias' is missing"):
        ema.load_weights(tmp_path / f"{NAME}-00001-of-00002.safetensors")
    assert_same(ema.state_dict()["weights"], before)


def test_a_folder_goes_with_strict_false(tmp_path: Path) -> None:
    weights = write(tmp_path, "sharded safetensors")
    ema = ModelEMA(nn.Sequential(*net(), nn.Linear(1, 1)))
    with pytest.warns(UserWarning, match="EMAModel has no '2.weight', '2.bias'.*counts 7 updates"):
        ema.load_weights(tmp_path, strict=False)
    loaded = ema.state_dict()["weights"]
    assert_same({name: loaded[name] for name in weights}, weights)


def diffusers_net() -> Any:
    """A class of models with a BatchNorm and a tie, as diffusers wants them."""
    pytest.importorskip("diffusers")
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config

    class Net(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, width: int = 4) -> None:
            super().__init__()
            self.first = nn.Linear(2, width)
            self.norm = nn.BatchNorm1d(width)
            self.last = nn.Linear(width, 2)

    return Net


@pytest.mark.filterwarnings("ignore:It is deprecated to pass a pretrained:FutureWarning")
@pytest.mark.parametrize("options", [{}, {"max_shard_size": 40}, {"safe_serialization": False}])
def test_diffusers_own_folder(options: dict[str, Any], tmp_path: Path) -> None:
    kind = diffusers_net()
    from diffusers.training_utils import EMAModel

    model = kind(width=5)
    theirs = EMAModel(model.parameters(), decay=0.5, model_cls=kind, model_config=model.config)
    for _ in range(4):
        with torch.no_grad():
            model.first.weight.add_(1)
            model.norm.running_mean.add_(1)
        theirs.step(model.parameters())
    with pytest.MonkeyPatch.context() as patch:
        save = kind.save_pretrained
        patch.setattr(kind, "save_pretrained", lambda self, path: save(self, path, **options))
        theirs.save_pretrained(tmp_path)
    assert len([*tmp_path.glob("*.index.json")]) == ("max_shard_size" in options)
    ema = ModelEMA(kind(width=5))
    ema.ema_model.norm.running_mean.fill_(9)
    with pytest.warns(UserWarning, match="EMAModel counts") as caught:
        ema.load_weights(tmp_path)
    (said,) = (str(warning.message) for warning in caught)
    assert "diffusers' EMAModel counts 4 updates: set update_index" in said
    assert re.search(
        "'norm.running_mean', 'norm.running_var', 'norm.num_batches_tracked' are those of a new "
        "model, as diffusers' EMAModel averages parameters only", said
    )  # fmt: skip
    for mine, shadow in zip(ema.ema_model.parameters(), theirs.shadow_params, strict=True):
        assert torch.equal(mine, shadow)
    assert not torch.equal(theirs.shadow_params[0], model.first.weight)
    # As diffusers itself loads it.
    loaded = EMAModel.from_pretrained(tmp_path, model_cls=kind)
    assert loaded.optimization_step == 4
    assert_same(ema.ema_model.state_dict(), kind.from_pretrained(tmp_path).state_dict())
    # A model's own folder, without a step.
    model.save_pretrained(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ema.load_weights(tmp_path / "model")
    assert_same(ema.ema_model.state_dict(), model.state_dict())


def test_a_tied_tensor_that_a_file_has_once_is_loaded(tmp_path: Path) -> None:
    """As transformers writes it."""
    model = nn.ModuleDict({"a": nn.Embedding(4, 3), "b": nn.Linear(3, 4, bias=False)})
    model["b"].weight = model["a"].weight
    for name in ("a.weight", "b.weight"):
        files.save_file({name: torch.full((4, 3), 2.0)}, tmp_path / "model.safetensors")
        for path in (tmp_path, tmp_path / "model.safetensors"):
            ema = ModelEMA(model)
            ema.load_weights(path)
            assert ema.ema_model["a"].weight.eq(2).all()
            assert ema.ema_model["b"].weight is ema.ema_model["a"].weight
    files.save_file({"c.weight": torch.ones(4, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"'a\.weight' is missing, 'b\.weight' is missing"):
        ema.load_weights(tmp_path)


def test_a_model_of_transformers_is_loaded(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=4, n_embd=4, n_layer=1, n_head=1, tie_word_embeddings=True
    )
    model = transformers.GPT2LMHeadModel(config)
    assert model.lm_head.weight is model.transformer.wte.weight
    model.save_pretrained(tmp_path)
    ema = ModelEMA(transformers.GPT2LMHeadModel(config))
    assert not torch.equal(ema.ema_model.lm_head.weight, model.lm_head.weight)
    ema.load_weights(tmp_path)
    assert_same(ema.ema_model.state_dict(), model.state_dict())
