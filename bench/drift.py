"""`python -m bench drift`: how far each precision strays from a float64 EMA in a long run.

Writes a table of its course, a picture, and the table of docs/precision.md.
"""

from __future__ import annotations

import argparse
import csv
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from bench import report
from bench.results import FOLDER
from ema_triton import ModelEMA
from ema_triton.ops.precision import PRECISIONS, RESIDUAL_DTYPE, join_residual

PAGE = report.ROOT / "docs" / "precision.md"
BEGIN, END = "<!-- python -m bench drift -->", "<!-- end of the drift -->"

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

# What a diffusion model is trained with, and long enough to forget where the EMA began.
MOMENTUM = 1e-4
UPDATES = 20_000
POINTS = 100

# Weights from 1 to 2, so that the spacing of their dtype is one number. Each drifts in the course
# of the run, by DRIFT in the mean, with a NOISE as training has it.
WEIGHTS = 4096
DRIFT = 0.05
NOISE = 0.01

WHEN = {
    "exact": "always, if the memory allows; the default",
    "stochastic": "the EMA must not take more memory or time than its weights",
    "nearest": "λ is far above the dtype's resolution (0.008, 0.001), or to repeat torch's results",
}


@dataclass(frozen=True)
class Point:
    """An EMA after some updates; values in spacings of its dtype.

    Attributes:
        dtype: Of the EMA and the online weights, "bf16" or "fp16".
        precision: Or "float64", the truth; or "accumulated", what is behind the exact weights.
        update: How many updates were made.
        moved: Mean over the weights of the way since the start.
        bias: Mean of the difference from float64.
        rms: Root of the mean square of that difference.
    """

    dtype: str
    precision: str
    update: int
    moved: float
    bias: float
    rms: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("--updates", type=int, default=UPDATES, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where table and picture go")
    parser.add_argument("--page", type=Path, default=PAGE, help="whose table it is")


def main(args: argparse.Namespace) -> None:
    """Run all precisions side by side, and write what became of them."""
    warnings.filterwarnings("ignore", "momentum .* is below the resolution")  # as shall be seen
    points = [point for dtype in DTYPES for point in course(dtype, args.updates)]
    args.out.mkdir(parents=True, exist_ok=True)
    save(points, args.out / "drift.csv")
    draw(points, args.out / "drift.png")
    print(table(points))
    text = args.page.read_text()
    args.page.write_text(report.with_section(text, section(points), BEGIN, END))


def course(dtype: str, updates: int) -> Iterator[Point]:
    """Average one drifting model with every precision, and with float64."""
    generator = torch.Generator().manual_seed(0)
    start = 1.2 + 0.6 * torch.rand(WEIGHTS, generator=generator, dtype=torch.float64)
    online = nn.ParameterList([nn.Parameter(start.to(DTYPES[dtype]))])
    start = online[0].detach().double()
    drift = 2 * DRIFT * torch.rand(WEIGHTS, generator=generator, dtype=torch.float64)
    truth = start.clone()
    emas = {precision: ModelEMA(online, precision=precision) for precision in PRECISIONS}
    spacing = torch.finfo(DTYPES[dtype]).eps
    every = max(1, updates // POINTS)
    for update in tqdm(range(1, updates + 1), desc=dtype, unit="update"):
        noise = NOISE * torch.randn(WEIGHTS, generator=generator, dtype=torch.float64)
        online[0].data.copy_(start + drift * update / updates + noise)
        truth.lerp_(online[0].detach().double(), MOMENTUM)
        for ema in emas.values():
            ema.update(MOMENTUM)
        if update % every == 0 or update == updates:
            exact = emas["exact"].state_dict()
            accumulated = join_residual(exact["weights"]["0"], exact["residuals"]["0"])
            values = {"float64": truth, "accumulated": accumulated.double()}
            values |= {name: ema.ema_model[0].detach().double() for name, ema in emas.items()}
            for name, value in values.items():
                yield _point(
                    dtype, name, update, (value - start) / spacing, (value - truth) / spacing
                )


def _point(dtype: str, precision: str, update: int, way: Tensor, error: Tensor) -> Point:
    rms = error.square().mean().sqrt().item()
    return Point(dtype, precision, update, way.mean().item(), error.mean().item(), rms)


def save(points: list[Point], path: Path) -> None:
    """Write the course as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Point)])
        writer.writeheader()
        for point in points:
            row = asdict(point)
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def load(path: Path) -> list[Point]:
    """Read what `save` wrote."""
    with path.open(newline="") as file:
        return [
            Point(
                row["dtype"],
                row["precision"],
                int(row["update"]),
                *(float(row[name]) for name in ("moved", "bias", "rms")),
            )
            for row in csv.DictReader(file)
        ]


def section(points: list[Point]) -> str:
    """The page's table and picture, which docs/hooks.py takes into the site."""
    picture = f"../{(FOLDER / 'drift.png').relative_to(report.ROOT)}"
    return f"{table(points)}\n\n![The course of each precision]({picture})"


def table(points: list[Point]) -> str:
    """What each precision costs, and how far it was from float64 at the end."""
    last = max(point.update for point in points)
    end = {(p.dtype, p.precision): p for p in points if p.update == last}
    heading = [
        "precision",
        "bytes stored per parameter, bf16 / fp16",
        "bytes moved per update",
        f"rms error after {last:,} updates",
        "mean error",
        "choose it when",
    ]
    lines = [f"| {' | '.join(heading)} |", "|" + "---|" * len(heading)]
    for precision in PRECISIONS:
        stored = [_stored(dtype, precision) for dtype in DTYPES.values()]
        moved = [_moved(dtype, precision) for dtype in DTYPES.values()]
        errors = [end[dtype, precision] for dtype in DTYPES]
        cells = [
            f'`"{precision}"`',
            " / ".join(map(str, stored)),
            " / ".join(map(str, moved)),
            " / ".join(f"{point.rms:.2f}" for point in errors),
            " / ".join(f"{point.bias:+.3f}" for point in errors),
            WHEN[precision],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    moved = " and ".join(f"{end[dtype, 'float64'].moved:.1f} ({dtype})" for dtype in DTYPES)
    accumulated = max(end[dtype, "accumulated"].rms for dtype in DTYPES)
    lines.append(
        "\nErrors against a float64 EMA of the same weights, in spacings of the dtype; "
        f"λ = {MOMENTUM:g}; {WEIGHTS} noisy weights from 1 to 2 that drift such that the EMA "
        f"should move by {moved} spacings. Rounding alone makes 0.29, and by that an exact EMA's "
        f"weights are off; what it accumulates is off by {accumulated:.4f} or less. "
        "(`python -m bench drift`, on any machine.)"
    )
    return "\n".join(lines)


def _stored(dtype: torch.dtype, precision: str) -> int:
    residual = RESIDUAL_DTYPE[dtype].itemsize if precision == "exact" else 0
    return dtype.itemsize + residual


def _moved(dtype: torch.dtype, precision: str) -> int:
    return dtype.itemsize + 2 * _stored(dtype, precision)


def draw(points: list[Point], path: Path) -> None:
    """Draw the way of each bf16 EMA, and how far it is from float64."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    way, error = figure.subplots(1, 2)
    for precision in ("float64", *PRECISIONS):
        course = [p for p in points if (p.dtype, p.precision) == ("bf16", precision)]
        style = {"color": "black", "linestyle": ":", "linewidth": 3, "zorder": 3}
        style = style if precision == "float64" else {"linewidth": 1.5}
        updates = [point.update for point in course]
        way.plot(updates, [point.moved for point in course], label=precision, **style)
        if precision != "float64":
            error.plot(updates, [point.rms for point in course], label=precision)
    _finish(way, "way of the EMA, mean, in spacings of bf16")
    _finish(error, "rms error of the weights, in spacings of bf16")
    error.set_ylim(bottom=0)
    figure.savefig(path, dpi=100)


def _finish(axes: Axes, label: str) -> None:
    axes.set_xlabel(f"updates, λ = {MOMENTUM:g}")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend()
