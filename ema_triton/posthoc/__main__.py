"""The command line: `python -m ema_triton`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from inspect import cleandoc

from ema_triton.checkpoint.interop import write_safetensors
from ema_triton.pairing import FLOATS
from ema_triton.posthoc import merging
from ema_triton.posthoc.plot import plot_profiles
from ema_triton.posthoc.snapshots import Snapshots
from ema_triton.schedules import PowerFunction

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


def snapshots(given: argparse.Namespace) -> str:
    """Say how many snapshots a folder has, from when, and how large they are.

    Also whether its log tells all that happened to the averages, or why not.

    python -m ema_triton snapshots run/snapshots
    """
    return repr(_opened(given))


def reconstruct(given: argparse.Namespace) -> str:
    """Rebuild the average with any power function from a folder of snapshots.

    Writes its weights, and what the error is: the profile error, how far the combination's weights
    over the updates are from the target's; the noise gain, by which the rounding of the snapshots
    grows; and what error of the weights to expect from both.

    python -m ema_triton reconstruct run/snapshots --sigma-rel 0.07 --out ema.safetensors
    """
    target, folder = PowerFunction(sigma_rel=given.sigma_rel, gamma=given.gamma), _opened(given)
    how = {"at": given.at, "approximate": given.approximate}
    result = folder.reconstruct(target, **how)
    more = {"reconstructed_from": json.dumps({"target": str(target), **result.coefficients})}
    write_safetensors(given.out, result.weights, result.update_index, more)
    if given.plot is not None:
        plot_profiles(given.plot, folder, target, **how)
    return (
        f"{target} at update {result.update_index}, of {len(result.coefficients)} snapshots\n"
        f"profile error   {result.profile_error:.2g}\n"
        f"noise gain      {result.noise_gain:.2g}\n"
        f"expected error  {result.expected_error:.2g}\n"
        f"written: {', '.join(filter(None, (given.out, given.plot)))}"
    )


def merge(given: argparse.Namespace) -> str:
    """Average checkpoints of a model, in place of a decay of the learning rate.

    Writes the sum of coefficient times checkpoint: accumulated in fp64, rounded once, with one
    tensor at a time in memory. Integers, like BatchNorm's counts, are the last checkpoint's. The
    file's metadata has the checkpoints' paths, coefficients and sha256.

    python -m ema_triton merge --shape 1-sqrt step1.pt step2.pt step3.pt --out merged.safetensors
    """
    merged = merging.merge(
        given.checkpoints,
        given.coefficients or given.shape or "equal",
        out=given.out,
        dtype=DTYPES.get(given.dtype),
        key=given.key,
    )
    lines = [f"{one['coefficient']:<12.6g}{one['path']}" for one in merged]
    return "\n".join([*lines, f"written: {given.out}"])


def _opened(given: argparse.Namespace) -> Snapshots:
    if not os.path.isdir(given.folder):
        raise OSError(
            f"There is no folder '{given.folder}'. Give the one in which a training saves its "
            "snapshots: Snapshots(folder).save(ema)."
        )
    if given.ema_pytorch:
        schedules = [PowerFunction(sigma_rel=sigma) for sigma in given.ema_pytorch]
        return Snapshots.from_ema_pytorch(given.folder, schedules, update_every=given.update_every)
    return Snapshots(given.folder)


def numbers(text: str) -> list[float]:
    """An argument's numbers, with commas between; argparse says "invalid numbers value"."""
    return [float(number) for number in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ema_triton", description="Averages of model weights, after the training."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    added = []
    for run in (snapshots, reconstruct, merge):
        text = cleandoc(run.__doc__ or "")
        command = commands.add_parser(
            run.__name__,
            help=text.partition("\n")[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        added.append(command)
    for command in added[:2]:
        add = command.add_argument
        add("folder", metavar="FOLDER", help="where a training saves its snapshots")
        text = "where ema-pytorch's PostHocEMA with these sigma_rels saves its checkpoints"
        add("--ema-pytorch", metavar="S,S,...", type=numbers, help=text)
        text = "that PostHocEMA's (default: 100, as its own)"
        add("--update-every", type=int, default=100, metavar="N", help=text)
    for command in added[1:]:
        text = "the safetensors file to write or replace"
        command.add_argument("--out", required=True, metavar="FILE", help=text)

    add, either = added[1].add_argument, added[1].add_mutually_exclusive_group(required=True)
    text = "the width of the wanted power function, as a fraction of the training: up to 0.2886"
    either.add_argument("--sigma-rel", type=float, metavar="S", help=text)
    either.add_argument("--gamma", type=float, metavar="G", help="or its exponent")
    add("--at", type=int, metavar="N", help="after which update (default: the last snapshot's)")
    add("--plot", metavar="PNG", help="draw the profiles, too; takes matplotlib")
    text = "accept a log that does not tell all, and a target out of reach"
    add("--approximate", action="store_true", help=text)

    add, either = added[2].add_argument, added[2].add_mutually_exclusive_group()
    text = (
        "the oldest first (a shell's * puts step10 before step9; the order is printed): files of "
        "safetensors or torch.save, folders of torch.distributed.checkpoint or save_pretrained"
    )
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help=text)
    text = (
        "the decay of the learning rate that the average stands for; a linear one is an equal "
        "average (default: equal)"
    )
    either.add_argument("--shape", choices=merging.DECAYS, help=text)
    text = "or a number for each checkpoint, none of them negative, which sum to 1"
    either.add_argument("--coefficients", metavar="C,C,...", type=numbers, help=text)
    add("--dtype", choices=DTYPES, help="of the result (default: the checkpoints')")
    add("--key", help="where the weights are in nested checkpoints, e.g. model or ema.weights")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, given by its arguments or `sys.argv`; return the exit status.

    It is 0; 1 after an error, whose text is on stderr; 130 after Ctrl-C. argparse exits with 2.
    """
    given = _parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda text, *_, **__: _say(f"warning: {text}")
        try:
            sys.stdout.write(f"{given.run(given)}\n")
        except KeyboardInterrupt:
            _say("interrupted: nothing was written")
            return 130
        except (ImportError, MemoryError, OSError, ValueError) as error:
            _say(f"error: {error}")
            return 1
    return 0


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
