"""Watch an EMA in TensorBoard: its momentum, and how far it is from the online model.

A small net learns a sine. Look at the curves with: tensorboard --logdir tensorboard_run
(`pip install tensorboard`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from ignite.engine import Engine, Events
from ignite.handlers import TensorboardLogger, global_step_from_engine
from ignite.handlers.tensorboard_logger import OutputHandler
from torch import nn

from ema_triton import EMAHandler


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Log an EMA's momentum and distance to TensorBoard.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--iterations", type=int, default=2000, help="of training")
    parser.add_argument("--every", type=int, default=20, help="iterations between two points")
    parser.add_argument("--output", type=Path, default=Path("tensorboard_run"), help="log folder")
    return parser.parse_args()


def main() -> None:
    """Train and log."""
    args = parse_args()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def step(_: Engine, batch: torch.Tensor) -> float:
        loss = (model(batch) - torch.sin(batch)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    trainer = Engine(step)
    handler = EMAHandler(model, momentum=0.005, momentum_warmup=0.2, warmup_iters=500)
    handler.attach(trainer)

    @trainer.on(Events.ITERATION_COMPLETED(every=args.every))
    def show_distance(engine: Engine) -> None:
        engine.state.ema_distance = handler.ema.distance()._asdict()

    with TensorboardLogger(log_dir=args.output) as logger:
        logger.attach(
            trainer,
            OutputHandler(
                tag="training",
                output_transform=lambda loss: {"loss": loss},
                # A number, and a dict: training/ema_distance/distance, .../norm, and by name of a
                # module, .../modules/NAME/0 (its distance) and .../modules/NAME/1 (its norm).
                state_attributes=["ema_momentum", "ema_distance"],
                global_step_transform=global_step_from_engine(trainer, Events.ITERATION_COMPLETED),
            ),
            event_name=Events.ITERATION_COMPLETED(every=args.every),
        )
        trainer.run([torch.randn(32, 1) * 2 for _ in range(args.iterations)], max_epochs=1)
    distance = trainer.state.ema_distance
    print(f"The EMA ended {distance['distance']:.3f} from weights of norm {distance['norm']:.3f}.")
    print(f"Look at it: tensorboard --logdir {args.output}")


if __name__ == "__main__":
    main()
