"""The commands `snapshots` and `reconstruct`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable

from ema_triton.checkpoint.interop import write_safetensors
from ema_triton.posthoc.plot import plot_profiles
from ema_triton.posthoc.snapshots import Snapshots
from ema_triton.schedules import PowerFunction

Progress = Callable[[int, int], object]


def add_folder(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command `snapshots`."""
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="where a training saves its snapshots")
    add(
        "--ema-pytorch",
        metavar="S,S,...",
        type=numbers,
        help="where ema-pytorch's PostHocEMA with these sigma_rels saves its checkpoints",
    )
    add(
        "--update-every",
        type=int,
        default=100,
        metavar="N",
        help="PostHocEMA's (default: 100, which is its own)",
    )


def numbers(text: str) -> list[float]:
    """The numbers of an argument."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not numbers with commas between: {text!r}") from error


def describe(arguments: argparse.Namespace, _: Progress) -> str:
    """Say how many snapshots a folder has, from when, and how large they are.

    Also whether its log tells all that happened to the averages, or why not.

    python -m ema_triton snapshots run/snapshots
    """
    return repr(_existing(arguments))


def add_target(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command `reconstruct`."""
    add_folder(parser)
    add, either = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    either.add_argument(
        "--sigma-rel",
        type=float,
        metavar="S",
        help="the width of the wanted power function, as a fraction of the training: from 0 to "
        "0.2886",
    )
    either.add_argument("--gamma", type=float, metavar="G", help="or its exponent")
    add("--out", required=True, metavar="FILE", help="the safetensors file to write or replace")
    add("--at", type=int, metavar="N", help="after which update (default: the last snapshot's)")
    add("--plot", metavar="PNG", help="draw the profiles, too; takes matplotlib")
    add(
        "--approximate",
        action="store_true",
        help="accept a log that does not tell all, and a target out of reach",
    )


def rebuild(arguments: argparse.Namespace, _: Progress) -> str:
    """Rebuild the average with any power function from a folder of snapshots.

    Writes its weights, and what the error is: the profile error, how far the combination's weights
    over the updates are from the target's; the noise gain, by which the rounding of the snapshots
    grows; and what error of the weights to expect from both.

    python -m ema_triton reconstruct run/snapshots --sigma-rel 0.07 --out ema.safetensors
    """
    target = PowerFunction(sigma_rel=arguments.sigma_rel, gamma=arguments.gamma)
    snapshots = _existing(arguments)
    given = {"at": arguments.at, "approximate": arguments.approximate}
    result = snapshots.reconstruct(target, **given)
    more = {"reconstructed_from": json.dumps({"target": str(target), **result.coefficients})}
    write_safetensors(arguments.out, result.weights, result.update_index, more)
    lines = [
        f"{target} at update {result.update_index}, of {len(result.coefficients)} snapshots",
        f"profile error   {result.profile_error:.2g}",
        f"noise gain      {result.noise_gain:.2g}",
        f"expected error  {result.expected_error:.2g}",
        f"written: {arguments.out}",
    ]
    if arguments.plot is not None:
        plot_profiles(arguments.plot, snapshots, target, **given)
        lines.append(f"drawn: {arguments.plot}")
    return "\n".join(lines)


def _existing(arguments: argparse.Namespace) -> Snapshots:
    folder = arguments.folder
    if not os.path.isdir(folder):
        raise OSError(
            f"There is no folder '{folder}'. Give the one in which a training saves its snapshots: "
            "Snapshots(folder).save(ema)."
        )
    if arguments.ema_pytorch:
        schedules = [PowerFunction(sigma_rel=sigma) for sigma in arguments.ema_pytorch]
        return Snapshots.from_ema_pytorch(folder, schedules, update_every=arguments.update_every)
    return Snapshots(folder)
