"""A training for torchrun to restart: one rank is killed once, and the last checkpoint goes on.

elastic_training.py FOLDER STEPS VICTIM STEP_OF_DEATH; with VICTIM -1 no rank is killed.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from ema_triton import LinearWarmup, ModelEMA

EVERY = 5  # steps from one checkpoint to the next


class Training:
    def __init__(self, model, optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self):
        weights, moments = get_state_dict(self.model, self.optimizer)
        return {"weights": weights, "moments": moments}

    def load_state_dict(self, state) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["weights"],
            optim_state_dict=state["moments"],
        )


def main() -> None:
    folder, steps, victim, death = Path(sys.argv[1]), *map(int, sys.argv[2:])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).to(torch.bfloat16)
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    ema = ModelEMA(model)
    ema.follow(optimizer, LinearWarmup(0.5, 0.01, 10))
    everything = {"training": Training(model, optimizer), "ema": ema}

    checkpoints = sorted(folder.glob("step-*"), key=lambda path: int(path.name[5:]))
    if checkpoints:
        dcp.load(everything, checkpoint_id=checkpoints[-1])
    for step in range(ema.update_index, steps):
        if rank == victim and step == death and not (folder / "died").exists():
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        torch.manual_seed(1000 * step + rank)
        optimizer.zero_grad()
        model(torch.randn(6, 5, dtype=torch.bfloat16)).float().square().mean().backward()
        optimizer.step()
        if (step + 1) % EVERY == 0:
            dcp.save(everything, checkpoint_id=folder / "unfinished")
            if rank == 0:
                shutil.rmtree(folder / f"step-{step + 1}", ignore_errors=True)
                (folder / "unfinished").rename(folder / f"step-{step + 1}")
            dist.barrier()
    state = ema.state_dict(full_state_dict=True)
    if rank == 0:
        torch.save(state, folder / "ema.pt")
        (folder / "resumed").write_text(checkpoints[-1].name if checkpoints else "from nothing")
    dist.barrier()
    dist.destroy_process_group()
    # Torch's own threads abort a process now and then that has used gloo, FSDP2 and checkpoints
    # (5 of 24 without this library), when C++ takes them down at its end.
    os._exit(0)


if __name__ == "__main__":
    main()
