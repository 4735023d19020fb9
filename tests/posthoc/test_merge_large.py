"""Merging a large model in little memory, in a process that is killed, from sharded folders."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard

pytest.importorskip("safetensors")

import safetensors.torch

from ema_triton.posthoc import merge
from tests.ranks import run

TENSORS, ELEMENTS = 20, 1 << 20
TENSOR = 4 * ELEMENTS  # bytes of fp32
# The sum in fp64 (2), the result, a piece that is converted, and of a folder also what was read.
FEW = 6 * TENSOR

# Anonymous memory is what the process cannot give back; pages of mapped files it can. Run in a
# process of its own, with an allocator that returns what is freed.
MEASURE = """
import sys, threading
import torch, torch.distributed.checkpoint
from ema_triton.checkpoint.interop import read_file
from ema_triton.posthoc import merge

def used():
    with open("/proc/self/status") as status:
        return 1024 * int(next(line for line in status if line.startswith("RssAnon")).split()[1])

def peak(function):
    before, found, ended = used(), [], threading.Event()

    def watch():
        while not ended.wait(0.0005):
            found.append(used() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = function()
    ended.set()
    watcher.join()
    return max(found)

out, *paths = sys.argv[1:]
print(peak(lambda: merge(paths, out=out)), peak(lambda: read_file(paths[0])))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    state = {f"{j}": torch.full((ELEMENTS,), float(j)) for j in range(TENSORS)}
    safetensors.torch.save_file(state, tmp_path / "a")
    torch.save(state, tmp_path / "b")
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(state, checkpoint_id=tmp_path / "c")
    paths = [str(tmp_path / name) for name in ("out", "a", "b", "c")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *paths],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    merged, read = map(int, done.stdout.split())
    assert merged < FEW
    assert read > TENSORS / 2 * TENSOR  # a whole model would be seen
    assert safetensors.torch.load_file(paths[0])["7"].unique().tolist() == [7.0]


KILLED = """
import os, signal, sys
from ema_triton.posthoc import merge, merging

add_up = merging.add_up

def third_kills(readers, coefficients, results):
    if "2" in coefficients:
        os.kill(os.getpid(), signal.SIGKILL)
    add_up(readers, coefficients, results)

merging.add_up = third_kills
merge(sys.argv[2:], out=sys.argv[1])
"""


def test_a_killed_merge_leaves_the_old_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        torch.save({f"{j}": torch.ones(100_000) for j in range(4)}, tmp_path / name)
    out = tmp_path / "out"
    out.write_bytes(b"old")
    os.link(out, tmp_path / "link")
    # Four tensors are written: the third is not.
    command = [sys.executable, "-c", KILLED, out, tmp_path / "a", tmp_path / "b"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert out.read_bytes() == b"old"
    merge([tmp_path / "a", tmp_path / "b"], out=out)
    assert (tmp_path / "link").read_bytes() == b"old"  # replaced, not written into
    assert safetensors.torch.load_file(out).keys() == {"0", "1", "2", "3"}


def test_a_failed_merge_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    torch.save({f"{j}": torch.ones(10) for j in range(4)}, tmp_path / "a")
    (tmp_path / "out").write_bytes(b"old")

    def fail(readers: object, coefficients: dict, results: object) -> None:
        if "2" in coefficients:
            raise KeyboardInterrupt

    monkeypatch.setattr("ema_triton.posthoc.merging.add_up", fail)
    with pytest.raises(KeyboardInterrupt):
        merge([tmp_path / "a"], out=tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"a", "out"}


def _save_sharded(folder: Path) -> None:
    for step in (1, 2):
        torch.manual_seed(step)
        model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))
        fully_shard(model)
        dcp.save({"model": model.state_dict()}, checkpoint_id=folder / str(step))
    assert dist.get_world_size() == 2


@pytest.mark.distributed
def test_sharded_folders_are_read_without_a_process_group(tmp_path: Path) -> None:
    run(2, _save_sharded, tmp_path)
    expected = {}
    for step in (1, 2):
        torch.manual_seed(step)
        for name, tensor in nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)).state_dict().items():
            expected[name] = expected.get(name, 0) + 0.5 * tensor
    merge([tmp_path / "1", tmp_path / "2"], out=tmp_path / "out")
    assert not dist.is_initialized()
    found = safetensors.torch.load_file(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name in found.keys() - {"1.num_batches_tracked"}:
        torch.testing.assert_close(found[name], expected[name])
    with safetensors.safe_open(tmp_path / "out", "pt") as file:
        (first, _) = json.loads(file.metadata()["merged_from"])
    assert first["sha256"].keys() == {".metadata", "__0_0.distcp", "__1_0.distcp"}
