"""Train a small GPT on Python's own manual, sharded by FSDP2, with an EMA that is sharded too.

    torchrun --nproc-per-node 2 examples/fsdp2.py
    torchrun --nproc-per-node 3 examples/fsdp2.py --resume

or, without torchrun, `python examples/fsdp2.py --ranks 2`. Every rank averages its own shards; the
checkpoints of torch.distributed.checkpoint fit any number of ranks; after each epoch the sharded
model is evaluated with its own weights and, swapped in place, with those of the EMA.
"""

import argparse
import pydoc_data.topics
import shutil
import sys
from pathlib import Path

import ignite.distributed as idist
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F  # noqa: N812
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from ema_triton import EMAHandler

CONTEXT = 64
BATCH = 24  # in all; 1, 2, 3, 4, 6 and 8 ranks share it evenly


class Block(nn.Module):
    """Causal self-attention and a perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, width] to the same."""
        qkv = self.attention(self.attention_norm(x)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(seen.transpose(1, 2).flatten(-2))
        return x + self.narrow(F.gelu(self.widen(self.norm(x))))


class GPT(nn.Module):
    """Says how badly it predicts each next byte of a text."""

    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, text: Tensor) -> Tensor:
        """Bytes [batch, time + 1] to their mean cross entropy."""
        before, after = text[:, :-1], text[:, 1:]
        x = self.bytes(before) + self.places(torch.arange(before.size(1), device=text.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), after.flatten())


class Training:
    """What of the model and the optimizer goes into a checkpoint; `Stateful`, as the EMA is."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict:
        """Weights and moments by name, in shards."""
        weights, moments = get_state_dict(self.model, self.optimizer)
        return {"weights": weights, "moments": moments}

    def load_state_dict(self, state: dict) -> None:
        """Put them back."""
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["weights"],
            optim_state_dict=state["moments"],
        )


def batch_of(text: Tensor, seed: int) -> Tensor:
    """This rank's share of a batch that is the same for any number of ranks."""
    chance = torch.Generator().manual_seed(seed)
    begins = torch.randint(len(text) - CONTEXT - 1, (BATCH,), generator=chance)
    mine = begins[idist.get_rank() :: idist.get_world_size()]
    return torch.stack([text[begin : begin + CONTEXT + 1] for begin in mine]).to(idist.device())


def train(_: int, options: argparse.Namespace) -> None:
    """What each rank does."""
    torch.manual_seed(0)
    topics = "\n".join(pydoc_data.topics.topics.values()).encode()
    text = torch.frombuffer(bytearray(topics), dtype=torch.uint8).long()
    training_text, validation_text = text[: -len(text) // 10], text[-len(text) // 10 :]

    model = GPT().to(idist.device())
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    def step(engine: Engine, _: int) -> float:
        model.train()
        optimizer.zero_grad()
        loss = model(batch_of(training_text, engine.state.iteration))
        loss.backward()
        optimizer.step()
        return loss.item()

    @torch.no_grad()
    def evaluate(engine: Engine, seed: int) -> float:
        model.eval()
        engine.state.total += model(batch_of(validation_text, seed)).item()
        return engine.state.total

    trainer, of_online, of_ema = Engine(step), Engine(evaluate), Engine(evaluate)
    handler = EMAHandler(model, momentum=0.02, momentum_warmup=0.5, warmup_iters=50)
    handler.attach(trainer)
    handler.attach_swap(of_ema)
    for evaluator in (of_online, of_ema):
        evaluator.add_event_handler(
            Events.STARTED, lambda engine: setattr(engine.state, "total", 0.0)
        )

    # An Engine has the two methods of a Stateful as well.
    everything = {"training": Training(model, optimizer), "ema": handler, "trainer": trainer}

    # In a log, each step of the bar would be a line.
    on_terminal = sys.stdout.isatty() and sys.stderr.isatty()
    if idist.get_rank() == 0 and on_terminal and not options.quiet:
        ProgressBar().attach(trainer, output_transform=lambda loss: {"loss": loss})

    @trainer.on(Events.EPOCH_COMPLETED)
    def report() -> None:
        losses = []
        for evaluator in (of_online, of_ema):
            evaluator.run(range(8))
            losses.append(idist.all_reduce(evaluator.state.total) / 8 / idist.get_world_size())
        if idist.get_rank() == 0:
            print(
                f"iteration {trainer.state.iteration}: validation loss {losses[0]:.4f} of the "
                f"online model, {losses[1]:.4f} of its EMA",
                flush=True,
            )

    @trainer.on(Events.EPOCH_COMPLETED)
    def save() -> None:
        folder = options.folder / f"iteration-{trainer.state.iteration}"
        unfinished = options.folder / "unfinished"
        dcp.save(everything, checkpoint_id=unfinished)
        if idist.get_rank() == 0:  # a checkpoint has its name only once it is whole
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
        idist.barrier()

    checkpoints = sorted(
        options.folder.glob("iteration-*"), key=lambda path: int(path.name.partition("-")[2])
    )
    if options.resume and checkpoints:
        dcp.load(everything, checkpoint_id=checkpoints[-1])
        if idist.get_rank() == 0:
            print(f"Resumed from {checkpoints[-1]} on {idist.get_world_size()} ranks.", flush=True)
        trainer.state.max_epochs = max(options.epochs, trainer.state.epoch)
    if trainer.state.iteration < options.epochs * options.every:
        trainer.run(range(options.every), max_epochs=options.epochs)

    handler.ema.save_weights(options.folder / "ema.safetensors")  # whole tensors, by rank 0
    if idist.get_rank() == 0:
        print(f"The EMA's weights are in {options.folder / 'ema.safetensors'}.", flush=True)
    idist.barrier()  # nobody ends while another one still talks


def main() -> None:
    """Read the options, and start or join the other ranks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--every", type=int, default=100, help="iterations of an epoch")
    parser.add_argument("--folder", type=Path, default=Path("fsdp2_run"))
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint, if any")
    parser.add_argument("--ranks", type=int, help="processes to start, without torchrun")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    with idist.Parallel(backend=backend, nproc_per_node=options.ranks) as parallel:
        parallel.run(train, options)


if __name__ == "__main__":
    main()
