"""Train a small net on handwritten digits on several processes, with an EMA on each of them.

    torchrun --nproc-per-node 2 examples/ddp.py
    torchrun --nproc-per-node 2 examples/ddp.py --resume --epochs 20

`DistributedDataParallel` gives all ranks the same weights, and so their EMAs are the same, although
nothing is sent between them: digests of their bytes show it. So rank 0's is the one to save. For
models that are sharded over the ranks see fsdp2.py.
"""

import argparse
import hashlib
import os
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from ema_triton import HalfLife, ModelEMA

BATCH = 48  # in all; 1, 2, 3, 4, 6 and 8 ranks share it evenly


def make_model() -> nn.Module:
    """A perceptron for digits of 8 x 8 pixels in a row."""
    return nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 10))


def digest(weights: dict[str, Tensor]) -> str:
    """The same for the same bits, and for no others."""
    found = hashlib.sha256()
    for weight in weights.values():
        found.update(weight.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The fraction of digits that it tells."""
    return (model(images).argmax(1) == labels).float().mean().item()


def train(options: argparse.Namespace, device: torch.device) -> None:
    """What each rank does."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    images = images.float() / 16
    training, test = (images[:1440], labels[:1440]), (images[1440:], labels[1440:])
    sampler = DistributedSampler(training[0], seed=0)
    loader = DataLoader(TensorDataset(*training), BATCH // ranks, sampler=sampler)

    torch.manual_seed(rank)  # the weights at the start are rank 0's all the same
    model = DistributedDataParallel(make_model().to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    ema = ModelEMA(model)  # after the wrapping, which has given all ranks rank 0's weights
    ema.follow(optimizer, HalfLife(30))
    epoch, checkpoint = 0, options.folder / "checkpoint.pt"
    if options.resume and checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        epoch = state["epoch"]

    while epoch < options.epochs:
        sampler.set_epoch(epoch)
        for batch, targets in loader:
            loss = nn.functional.cross_entropy(model(batch.to(device)), targets.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()  # and the EMA is updated
        epoch += 1

        digests: list[str] = [""] * ranks
        dist.all_gather_object(digests, digest(ema.ema_model.state_dict()))
        if rank == 0:
            on_device = [tensor.to(device) for tensor in test]
            online, averaged = (accuracy(m, *on_device) for m in (ema.model, ema.ema_model))
            print(
                f"epoch {epoch}: accuracy {online:.4f}, of the EMA {averaged:.4f}; the EMAs after "
                f"{ema.update_index} updates: {', '.join(digests)}",
                flush=True,
            )
            state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"ema": ema.state_dict(), "epoch": epoch}, f"{checkpoint}.new")
            os.replace(f"{checkpoint}.new", checkpoint)  # it is whole before the old one goes
    dist.barrier()  # no rank ends while another one still sends


def main() -> None:
    """Read the options, and join the other ranks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("ddp_run"))
    parser.add_argument("--resume", action="store_true", help="from the checkpoint, if any")
    options = parser.parse_args()
    options.folder.mkdir(exist_ok=True)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    try:
        train(options, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
