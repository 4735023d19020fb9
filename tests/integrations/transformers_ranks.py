"""What one rank of a test does, started by torchrun: a Trainer's training, crashed and resumed.

Its arguments are a folder, into which it writes what it found, and how the model is distributed.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainerCallback

from ema_triton.integrations.transformers import attach
from tests.integrations.with_transformers import (
    SCHEDULE,
    At,
    Crashed,
    Truth,
    arguments,
    bert,
    crash,
    examples,
)

torch.set_num_threads(1)
folder, sharded = Path(sys.argv[1]), sys.argv[2] == "sharded"


class Sharded(Trainer):
    """Of a model sharded by FSDP2, which accelerate does on GPUs only.

    To a Trainer it is one that transformers has sharded at load time. What the Trainer does of the
    model's files takes a GPU too.
    """

    def _save(self, output_dir=None, state_dict=None) -> None:
        weights = {name: tensor.full_tensor() for name, tensor in self.model.named_parameters()}
        if self.args.should_save:
            os.makedirs(output_dir)
            torch.save(weights, Path(output_dir) / "weights.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        weights = torch.load(Path(resume_from_checkpoint) / "weights.pt", weights_only=True)
        for name, tensor in self.model.named_parameters():
            like = torch.distributed.tensor.distribute_tensor(
                weights[name], tensor.device_mesh, tensor.placements
            )
            tensor.data.copy_(like)


def begin(name: str, **given):
    kind = {"save_only_model": True} if sharded else {"gradient_accumulation_steps": 2}
    given = {"ddp_backend": "gloo", **kind, **given}
    args = arguments(folder / name, **given)
    data, model = {"train_dataset": examples(), "eval_dataset": examples()}, bert()
    if not sharded:
        trainer = Trainer(model, args, **data)
    else:
        assert args.device.type == "cpu"  # which makes the process group
        mesh = init_device_mesh("cpu", (2,))
        for module in (*model.bert.encoder.layer, model):
            fully_shard(module, mesh=mesh)
        type(model).is_distributed_loading_by_transformers = True  # FSDP2's own class, of this one
        trainer = Sharded(model, args, **data)
    return trainer, attach(trainer, SCHEDULE)


class AtBegin(TrainerCallback):
    """Notes what the EMA is when a training begins."""

    def on_train_begin(self, *_, **__) -> None:
        self.state = whole_state()


def whole_state():
    """Of this rank's EMA; of a sharded one, on rank 0."""
    return attached.ema.state_dict(full_state_dict=sharded, clone=not sharded)


trainer, attached = begin("whole")
truth = Truth()
if not sharded:
    trainer.add_callback(truth)
trainer.train()
found = {"whole": whole_state(), "wrapper": type(trainer.model_wrapped).__name__}
if not sharded:
    truth.check(dict(attached.ema.ema_model.named_parameters()))
found["predicted"] = torch.from_numpy(trainer.predict(examples()).predictions)
found["after"] = whole_state()

trainer, attached = begin("run")
trainer.add_callback(At(5, crash))
try:
    trainer.train()
except Crashed:
    dist.barrier()
else:
    raise AssertionError("the training did not crash")

trainer, attached = begin("run")
note = AtBegin()
trainer.add_callback(note)
trainer.train(resume_from_checkpoint=str(folder / "run/checkpoint-4"))
found |= {"at begin": note.state, "resumed": whole_state()}

if not sharded:
    scores = iter([1.0, 3.0, 2.0])
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score"}
    trainer, attached = begin("best", eval_strategy="steps", eval_steps=2, **best)
    trainer.compute_metrics = lambda _: {"score": next(scores)}
    trainer.train()
    found["best"] = whole_state()

torch.save(found, folder / f"{os.environ['RANK']}.pt")
dist.barrier()
dist.destroy_process_group()
