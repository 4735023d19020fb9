"""What the EMA of a sharded model takes on each rank: bytes, memory, time; on paper."""

from __future__ import annotations

import argparse
from typing import NamedTuple


class Decoder(NamedTuple):
    """A decoder-only transformer as Llama's: the shapes of its tensors."""

    name: str
    vocabulary: int
    width: int
    layers: int
    hidden: int
    key_value: int

    def shapes(self) -> list[tuple[int, ...]]:
        """Of every parameter."""
        d, h, kv = self.width, self.hidden, self.key_value
        layer = [(d, d), (kv, d), (kv, d), (d, d), (h, d), (h, d), (d, h), (d,), (d,)]
        return [(self.vocabulary, d), *(layer * self.layers), (d,), (self.vocabulary, d)]


MODELS = (
    Decoder("7 B", 32_000, 4096, 32, 11_008, 4096),
    Decoder("70 B", 128_256, 8192, 80, 28_672, 1024),
    Decoder("405 B", 128_256, 16_384, 126, 53_248, 1024),
)
RANKS = (8, 64, 512, 2048, 16_384)

# Bytes per element of a shard: what the EMA stores, be it fp32 or bf16 with its residual, and
# what an update moves, reading both sides and writing one.
STORED = 4
MOVED = (12, 10)  # fp32; bf16 exact


def on_the_fullest_rank(shapes: list[tuple[int, ...]], ranks: int) -> int:
    """Elements that rank 0 has: `fully_shard` deals each tensor's rows out in equal chunks."""
    total = 0
    for rows, *rest in shapes:
        part = -(-rows // ranks)
        for size in rest:
            part *= size
        total += part
    return total


def table(bandwidth: float, per_tensor: float) -> str:
    """Markdown.

    Args:
        bandwidth: Bytes per second of a copy on the device.
        per_tensor: Seconds for looking whether a tensor has moved, on the host.
    """
    lines = [
        "| model | ranks | elements on the fullest rank | EMA, fp32 or bf16 exact "
        "| device, fp32 | device, bf16 exact | host |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for model in MODELS:
        shapes = model.shapes()
        for ranks in RANKS:
            elements = on_the_fullest_rank(shapes, ranks)
            cells = [model.name, f"{ranks:,}", f"{elements / 1e6:,.1f} M"]
            cells += [f"{STORED * elements / 2**20:,.0f} MiB"]
            cells += [f"{1e3 * moved * elements / bandwidth:,.3f} ms" for moved in MOVED]
            cells += [f"{1e3 * per_tensor * len(shapes):,.2f} ms"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the command line."""
    parser.add_argument("--bandwidth", type=float, default=4.3e12, help="of a copy, bytes/s")
    parser.add_argument("--per-tensor", type=float, default=0.5e-6, help="host seconds")


def main(args: argparse.Namespace) -> None:
    """Print the table."""
    print(table(args.bandwidth, args.per_tensor))
