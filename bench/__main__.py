"""The command line: `python -m bench COMMAND`."""

from __future__ import annotations

import argparse
import importlib
import sys

# The modules are imported when asked for: ptx needs no peers, report no torch device.
COMMANDS = {
    "run": "time one EMA update",
    "step": "time a training step with and without EMA",
    "tune": "try other constants, and other kernels, than those that ship",
    "host": "where the microseconds of a call of update() go",
    "cold": "time the first update of a process, with and without Triton's cache",
    "around": "time what stands around an update: guard, swap, distance, state",
    "drift": "average in each precision for 20,000 updates, beside float64",
    "scaling": "what the EMA of a sharded model takes on each rank, on paper",
    "ptx": "compile the kernels for other machines and look at their code",
    "report": "write the tables and pictures of results files",
}


def main() -> None:
    """Hand over to the command's module."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "command", choices=COMMANDS, help="; ".join(map(": ".join, COMMANDS.items()))
    )
    parser.add_argument(
        "rest", nargs=argparse.REMAINDER, help="see `python -m bench COMMAND --help`"
    )
    args = parser.parse_args()
    module = importlib.import_module(f"bench.{args.command}")
    command = argparse.ArgumentParser(
        prog=f"python -m bench {args.command}", description=COMMANDS[args.command]
    )
    module.add_arguments(command)
    # Into a pipe too, so that a command that is cut off has printed what it found.
    sys.stdout.reconfigure(line_buffering=True)
    module.main(command.parse_args(args.rest))


if __name__ == "__main__":
    main()
