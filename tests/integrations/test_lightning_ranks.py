"""`EMACallback` on two ranks: DDP, ddp_spawn, and FSDP2 by `ModelParallelStrategy`."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import ranks

pytest.importorskip("lightning.pytorch")

pytestmark = [pytest.mark.distributed, pytest.mark.integration]


def as_rank() -> Any:
    """Have Lightning take this process for a rank that was started for it; `lightning_runs`."""
    warnings.simplefilter("ignore")  # Lightning's own, of small data and CPUs
    os.environ |= {"LOCAL_RANK": str(dist.get_rank()), "NODE_RANK": "0"}
    from tests.integrations import lightning_runs

    return lightning_runs


def fit(runs: Any, model: Any, *callbacks: Any, ckpt_path: Any = None, **options: Any) -> Any:
    options = {"devices": 2, "use_distributed_sampler": False, **options}
    made = runs.trainer(*callbacks, **options)
    made.fit(model, runs.batches(), runs.batches(2), ckpt_path=ckpt_path)
    return made


def on_ddp(folder: Path) -> None:
    runs = as_rank()

    class Net(runs.Net):
        """Each rank has data of its own."""

        def loss(self, stage: str, number: int) -> Any:
            return super().loss(stage, number + 10_000 * dist.get_rank())

    def trained(*callbacks: Any, **options: Any) -> tuple[Any, Any]:
        model, ema = Net(), runs.callback()
        fit(runs, model, ema, *callbacks, strategy="ddp", accumulate_grad_batches=2, **options)
        return model, ema

    oracle = runs.Oracle()
    model, whole = trained(oracle, runs.Save(folder))
    oracle.check(runs.ema_weights(whole))
    shown, own = model.seen["validate"][-1], runs.ema_weights(whole)
    buffers = {name for name in own if name not in runs.parameters(model)}
    for name in own.keys() - (buffers if dist.get_rank() else {}):  # DDP sends rank 0's buffers
        assert torch.equal(shown[name], own[name]), name
    assert runs.same(runs.weights(model), oracle.online[-1])
    parts = {name: own[name] for name in runs.parameters(model)}
    everywhere: list[Any] = [None, None]
    dist.all_gather_object(everywhere, parts)
    assert runs.same(*everywhere)

    dist.barrier()
    saved = runs.load(folder / "7.ckpt")
    assert "net.0.weight" in saved["state_dict"]
    resumed, ema = trained(ckpt_path=folder / "7.ckpt")
    assert runs.same(runs.weights(resumed), runs.weights(model))
    assert runs.same_state(ema, whole)

    model.fail_in = {"validate": ValueError("broken")}
    online, shown = runs.parameters(model), runs.ema_weights(whole)
    with pytest.raises(ValueError, match="broken"):
        runs.trainer(whole, devices=2, strategy="ddp").validate(model, runs.batches())
    assert runs.same(runs.parameters(model), online)
    assert all(torch.equal(runs.ema_weights(whole)[name], shown[name]) for name in online)


def test_ddp(tmp_path: Path) -> None:
    ranks.run(2, on_ddp, tmp_path, timeout=120)


def on_fsdp2(folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    from tests.sharded import wholes, wholes_of

    runs = as_rank()
    from lightning.pytorch.strategies import ModelParallelStrategy

    class Net(runs.Net):
        def __init__(self, compiled: bool) -> None:
            super().__init__(width=7)
            self.net = torch.nn.Sequential(self.net[0], torch.nn.LayerNorm(7), self.net[2])
            self.compiled = compiled

        def configure_model(self) -> None:
            if not isinstance(self.head.weight, DTensor):
                mesh = self.device_mesh["data_parallel"]
                for part in (self.net[0], self.net, self.head):
                    fully_shard(part, mesh=mesh)
                if self.compiled:
                    # Of torch.compile(self.net) Lightning's own checkpoints do not load.
                    self.net.compile(backend="eager")

        def loss(self, stage: str, number: int) -> Any:
            if stage == "test":
                self.whole = wholes(self)
            return super().loss(stage, number + 10_000 * dist.get_rank())

    class Seen(runs.pl.Callback):
        """The float64 EMA of whole tensors, and what validation sees."""

        def __init__(self) -> None:
            self.oracle, self.validated = runs.Oracle(), {}

        def on_train_start(self, trainer: Any, model: Any) -> None:
            self.oracle.before = {n: v.double() for n, v in wholes(model).items()}
            self.oracle.shadow = runs.Shadow(self.oracle.before)

        def on_train_batch_end(self, trainer: Any, model: Any, *_: Any) -> None:
            now = wholes(model)
            self.oracle.online.append(now)
            if trainer.global_step > self.oracle.updates:
                self.oracle.updates += 1
                self.oracle.shadow.update(now, self.oracle.schedule(self.oracle.updates))

        def on_validation_epoch_end(self, trainer: Any, model: Any) -> None:
            self.validated = wholes(model)
            if not trainer.sanity_checking:  # with the weights swapped
                trainer.save_checkpoint(under / f"epoch{trainer.current_epoch}.ckpt")

    # A file that rank 0 writes, and a folder of all ranks' parts.
    for number, (in_parts, submodule, compiled) in enumerate(
        [(False, "", False), (True, "", False), (True, "net", True)]
    ):
        under = folder / str(number)

        def trained(
            *callbacks: Any,
            options: Any = (in_parts, submodule, compiled),
            ckpt_path: Any = None,
        ) -> tuple[Any, ...]:
            strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=options[0])
            model, ema = Net(options[2]), runs.callback(submodule=options[1])
            made = fit(
                runs,
                model,
                ema,
                *callbacks,
                strategy=strategy,
                accumulate_grad_batches=2,
                ckpt_path=ckpt_path,
            )
            return made, model, ema

        seen = Seen()
        _, model, whole = trained(seen, runs.Save(under))
        state = wholes_of(whole.ema)
        prefix = f"{submodule}." if submodule else ""
        own = {prefix + name: value for name, value in state.items()}
        for name, value in own.items():
            truth = seen.oracle.shadow.values[name]
            assert torch.allclose(value.double(), truth, rtol=1e-5, atol=1e-6), name
            assert torch.equal(seen.validated[name], value), name
        assert runs.same(wholes(model), seen.oracle.online[-1])

        dist.barrier()
        for name in ("7", "epoch0"):
            made, resumed, ema = trained(ckpt_path=under / f"{name}.ckpt")
            assert runs.same(wholes(resumed), wholes(model)), (number, name)
            assert runs.same(wholes_of(ema.ema), state), (number, name)
            assert ema.ema.update_index == whole.ema.update_index == 6

        made.test(resumed, runs.batches(1), verbose=False)  # what is in memory
        assert all(torch.equal(resumed.whole[name], value) for name, value in own.items())
        assert runs.same(wholes(resumed), wholes(model)), number
        made.save_checkpoint(under / "last.ckpt")
        dist.barrier()
        strategy = ModelParallelStrategy(2, 1)
        tested = Net(compiled)
        tester = runs.trainer(devices=2, strategy=strategy, use_distributed_sampler=False)
        tester.test(tested, runs.batches(1), ckpt_path=under / "last.ckpt", verbose=False)
        for name, value in own.items():
            assert torch.equal(tested.whole[name], value), name
        if not in_parts and dist.get_rank() == 0:
            saved = runs.load(under / "last.ckpt")
            assert runs.same(saved["state_dict"], own)


def test_fsdp2(tmp_path: Path) -> None:
    ranks.run(2, on_fsdp2, tmp_path, timeout=200)


SPAWNED = """
import os, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, os.getcwd())

def main():
    import torch
    from tests.integrations import lightning_runs as runs
    torch.set_num_threads(1)

    def trained(*callbacks, **options):
        model, ema = runs.Net(), runs.callback(at_end="copy")
        made = runs.trainer(ema, *callbacks, strategy="ddp_spawn", devices=2,
                            use_distributed_sampler=False)
        made.fit(model, runs.batches(), runs.batches(2), **options)
        return model, ema, made

    model, ema, _ = trained(runs.Save(runs.Path(sys.argv[1])))
    assert ema.ema is None  # it was built, and is lost, in other processes
    alone = runs.callback()
    runs.fit(runs.Net(), alone)
    assert runs.same(runs.weights(model), runs.ema_weights(alone))
    resumed, _, _ = trained(ckpt_path=runs.Path(sys.argv[1]) / "7.ckpt")
    assert runs.same(runs.weights(resumed), runs.weights(model))
    print("same")

if __name__ == "__main__":
    main()
"""


def test_ddp_spawn(tmp_path: Path) -> None:
    import subprocess
    import sys

    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    done = subprocess.run(
        [sys.executable, script, tmp_path],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent.parent,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "."},
        timeout=300,
    )
    assert done.stdout.strip().endswith("same"), done.stderr
