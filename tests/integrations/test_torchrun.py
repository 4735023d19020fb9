"""Plain torchrun: the DDP example, and the scripts of the page about DDP and FSDP2."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ema_triton import Constant, ModelEMA
from tests import ranks
from tests.integrations.scripts import EXAMPLES, python_blocks, run_blocks, run_here, torchrun

pytestmark = pytest.mark.distributed
EXAMPLE = EXAMPLES / "ddp.py"


@pytest.fixture
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As torchrun sets the environment of the only rank."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for variable, value in {**alone, "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(variable, value)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def digests(printed: str) -> dict[int, list[str]]:
    """Of every rank's EMA after each epoch."""
    rows = re.findall(r"^epoch (\d+): .* updates: (.*)$", printed, re.MULTILINE)
    return {int(epoch): found.split(", ") for epoch, found in rows}


def accuracies(printed: str) -> list[float]:
    return [float(one) for one in re.findall(r"of the EMA (\d\.\d+)", printed)]


@pytest.mark.usefixtures("_alone", "one_thread")
def test_the_ddp_example_resumes_bit_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")

    def run(*options: str) -> str:
        run_here(monkeypatch, "ddp.py", *options)
        return capsys.readouterr().out

    uncut = run("--epochs=3", f"--folder={tmp_path / 'a'}")
    assert [*digests(uncut)] == [1, 2, 3]
    assert accuracies(uncut)[-1] > 0.8
    run("--epochs=2", f"--folder={tmp_path / 'b'}")
    torch.manual_seed(1)
    resumed = run("--resume", "--epochs=3", f"--folder={tmp_path / 'b'}")
    assert digests(resumed) == {3: digests(uncut)[3]}
    assert len({*map(tuple, digests(uncut).values())}) == 3  # the control
    states = [torch.load(tmp_path / folder / "checkpoint.pt") for folder in "ab"]
    for part in ("model", "ema"):
        one, other = (state[part].get("weights", state[part]) for state in states)
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.integration
def test_the_ddp_example_has_equal_emas_on_two_ranks_also_when_resumed(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    folders = [f"--folder={tmp_path / folder}" for folder in "ab"]
    uncut = torchrun(2, EXAMPLE, "--epochs=3", folders[0], ends_with="epoch 3")
    found = digests(uncut)
    assert [*found] == [1, 2, 3]
    for first, second in found.values():
        assert first == second
    torchrun(2, EXAMPLE, "--epochs=2", folders[1], ends_with="epoch 2")
    resumed = torchrun(2, EXAMPLE, "--resume", "--epochs=3", folders[1], ends_with="epoch 3")
    assert digests(resumed) == {3: found[3]}


def _digests_built_too_early() -> list[bool]:
    """Whether rank 0's EMA is every rank's, built after the wrapping and before it."""
    torch.manual_seed(dist.get_rank())
    net = nn.Linear(3, 2)
    early = ModelEMA(net)
    late = ModelEMA(DistributedDataParallel(net))
    equal = []
    for ema in (late, early):
        ema.update(0.1)
        weights: list = [None] * dist.get_world_size()
        dist.all_gather_object(weights, ema.ema_model.weight.detach())
        equal.append(all(torch.equal(weights[0], one) for one in weights))
    return equal


def test_an_ema_built_before_ddp_is_each_ranks_own() -> None:
    for found in ranks.run(2, _digests_built_too_early):
        assert found == [True, False]


def _built_before_sharding() -> None:
    net = nn.Linear(3, 2)
    ema = ModelEMA(net)
    fully_shard(net)
    with pytest.raises(ValueError, match="'weight'"):
        ema.update(0.1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ModelEMA(net).follow(optimizer, Constant(0.1))


def test_an_ema_built_before_sharding_is_an_error() -> None:
    ranks.run(2, _built_before_sharding)


@pytest.mark.usefixtures("_alone", "one_thread")
def test_the_scripts_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    monkeypatch.chdir(tmp_path)
    assert len(python_blocks("torchrun.md")) == 2
    names = run_blocks("torchrun.md")
    assert names["ema"].update_index == 100
    assert torch.load("checkpoint.pt")["ema"]["update_index"] == 100
    whole = names["ema"].state_dict()["weights"]["0.weight"].to_local()
    assert torch.equal(safetensors.load_file("ema.safetensors")["0.weight"], whole)


@pytest.mark.integration
def test_the_scripts_of_the_page_run_on_two_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = """
import hashlib
for name, weight in sorted(ema.state_dict()["weights"].items()):
    weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    print(f"{name} {ema.update_index} {hashlib.sha256(weight.numpy().tobytes()).hexdigest()}")
print("done", flush=True)
dist.barrier()
dist.destroy_process_group()
__import__("os")._exit(0)
"""
    for number, block in enumerate(python_blocks("torchrun.md")):
        script = tmp_path / f"train{number}.py"
        assert block.count("dist.destroy_process_group()\n") == 1
        script.write_text(block.replace("dist.destroy_process_group()\n", told))
        said = torchrun(2, script, ends_with="done")
        lines = re.findall(r"\d\.(?:weight|bias) 100 \w{64}", said)
        assert len(lines) == 8
        assert len({*lines}) == 4  # each of the two ranks' tensors is the other's
