"""Train a small diffusion model (DDPM) to draw digits, with accelerate, diffusers and an EMA.

    python examples/accelerate_ddpm.py
    torchrun --nproc-per-node 2 examples/accelerate_ddpm.py --resume --epochs 40

The EMA of the UNet's weights follows the optimizer's steps, is in accelerate's checkpoints, and is
what is kept at the end, in a folder that `UNet2DModel.from_pretrained` loads. The picture shows
what the online model and its EMA make of the same noise. It takes 40 seconds on one CPU core.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ema_triton import CountWarmup, Delayed, ModelEMA

BATCH = 32  # of all processes together
ACCUMULATE = 2  # batches to a step
LEARNING_RATE = 8e-3  # high, so that the online model jumps about
DIFFUSION_STEPS = 100
SAMPLES = 32


@dataclass
class Progress:
    """How far the training is; accelerate saves and loads it, as it does the EMA."""

    epoch: int = 0

    def state_dict(self) -> dict[str, int]:
        """Return it as a dict."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over what `state_dict` returned."""
        self.epoch = state["epoch"]


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=20, help="in all, default: 20")
    parser.add_argument("--images", type=int, default=1500, help="to train on, default: 1500")
    parser.add_argument("--sampling-steps", type=int, default=DIFFUSION_STEPS)
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and noise")
    parser.add_argument("--output", type=Path, default=Path("ddpm_run"), help="folder to write")
    parser.add_argument("--resume", action="store_true", help="from the checkpoint in --output")
    return parser.parse_args()


def load_images() -> Tensor:
    """The 1797 digits of scikit-learn as [1797, 1, 8, 8], from -1 to 1."""
    return torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 8 - 1


def make_unet() -> UNet2DModel:
    """A UNet of 150 thousand parameters."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        add_attention=False,
    )


def make_scheduler() -> DDPMScheduler:
    """How noise is added, and taken away again."""
    return DDPMScheduler(DIFFUSION_STEPS, beta_schedule="squaredcos_cap_v2")


def denoising_loss(
    unet: torch.nn.Module, images: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """How badly the UNet finds the noise in noisy images, each at a timestep of its own."""
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    timesteps = torch.randint(DIFFUSION_STEPS, (len(images),), generator=generator)
    timesteps = timesteps.to(images.device)
    noisy = make_scheduler().add_noise(images, noise, timesteps)
    return torch.nn.functional.mse_loss(unet(noisy, timesteps).sample.float(), noise)


@torch.no_grad()
def validation_loss(unet: torch.nn.Module, images: Tensor) -> float:
    """The loss with the same noise for every model."""
    return denoising_loss(unet.eval(), images, torch.Generator().manual_seed(0)).item()


def samples(unet: UNet2DModel, steps: int) -> Tensor:
    """What a model makes of the same noise as every other, [10, 10 * SAMPLES], with margins."""
    pipeline = DDPMPipeline(unet=unet.eval(), scheduler=make_scheduler())
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=SAMPLES,
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=steps,
        output_type="np",
    ).images
    return torch.cat([*torch.nn.functional.pad(torch.from_numpy(images[..., 0]), (1, 1, 1, 1))], 1)


def draw(rows: dict[str, Tensor], path: Path) -> None:
    """Draw each model's samples under its title, in two lines."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, (title, digits) in zip(figure.subplots(len(rows)), rows.items(), strict=True):
        axes.imshow(torch.cat(digits.chunk(2, dim=1)).numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set_title(title)
        axes.axis("off")
    figure.savefig(path, dpi=150)


def save(accelerator: Accelerator, output: Path, epoch: int) -> None:
    """Write a checkpoint, which has its name only once it is whole; and remove the one before."""
    accelerator.save_state(str(output / "unfinished"))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        older = [path for path in output.glob("epoch-*") if path.name != f"epoch-{epoch}"]
        shutil.rmtree(output / f"epoch-{epoch}", ignore_errors=True)
        (output / "unfinished").rename(output / f"epoch-{epoch}")
        for path in older:
            shutil.rmtree(path)
    accelerator.wait_for_everyone()


def train(args: argparse.Namespace) -> None:
    """Train, or go on training, up to `args.epochs`; then save the EMA and draw the picture."""
    # The order of the images is in no checkpoint: with a seedable sampler it is the epoch's.
    data = DataLoaderConfiguration(
        split_batches=True, use_seedable_sampler=True, data_seed=args.seed
    )
    accelerator = Accelerator(
        # Without it, processes that have no GPU would each take themselves for the only one.
        cpu=not torch.accelerator.is_available(),
        gradient_accumulation_steps=ACCUMULATE,
        dataloader_config=data,
    )
    set_seed(args.seed, device_specific=True)
    unet = make_unet()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE)
    images = load_images()
    valid_images = images[1500:].to(accelerator.device)
    loader = DataLoader(
        TensorDataset(images[: min(args.images, 1500)]), BATCH, shuffle=True, drop_last=True
    )
    unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)

    # After prepare(), which moves and wraps the model, and on every process.
    ema = ModelEMA(unet)
    ema.follow(optimizer, Delayed(CountWarmup(0.995), 1))
    progress = Progress()
    accelerator.register_for_checkpointing(ema, progress)
    accelerator.print(f"{accelerator.num_processes} processes, EMA backend: {ema.backend}")

    checkpoints = sorted(args.output.glob("epoch-*"), key=lambda path: int(path.name[6:]))
    if args.resume and checkpoints:
        accelerator.load_state(str(checkpoints[-1]))
        accelerator.print(f"resumed from {checkpoints[-1]}")

    losses = {}
    while progress.epoch < args.epochs:
        unet.train()
        loader.set_epoch(progress.epoch)
        for (batch,) in loader:
            with accelerator.accumulate(unet):
                loss = denoising_loss(unet, batch)
                accelerator.backward(loss)
                optimizer.step()  # a real one after ACCUMULATE batches, and an update of the EMA
                optimizer.zero_grad()
        progress.epoch += 1
        save(accelerator, args.output, progress.epoch)
        models = {"online": ema.model, "EMA": ema.ema_model}
        losses = {name: validation_loss(model, valid_images) for name, model in models.items()}
        accelerator.print(
            f"epoch {progress.epoch:3d}   {ema.update_index:4d} updates   validation loss: "
            f"online {losses['online']:.4f}   EMA {losses['EMA']:.4f}"
        )

    if accelerator.is_main_process:
        folder = args.output / "unet_ema"
        ema.ema_model.save_pretrained(folder)
        loaded = UNet2DModel.from_pretrained(folder).to(accelerator.device)
        models = {"the online model": ema.model, "its EMA, as loaded from the folder": loaded}
        rows = {
            f"{name}: validation loss {validation_loss(model, valid_images):.4f}": samples(
                model, args.sampling_steps
            )
            for name, model in models.items()
        }
        draw(rows, args.output / "digits.png")
        print(f"the EMA's weights: {folder}\npicture: {args.output / 'digits.png'}", flush=True)
    accelerator.end_training()


def main() -> None:
    """Read the options, and train."""
    args = parse_args()
    torch.set_num_threads(1)  # the UNet is too small to gain from more
    train(args)


if __name__ == "__main__":
    main()
