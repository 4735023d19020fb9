"""The command line of `ema_triton.posthoc`."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from inspect import cleandoc

from ema_triton.posthoc import commands, merging

# The first function adds the arguments. The second gets them and a progress callback, and returns
# what to print; its docstring is the command's help.
COMMANDS = {
    "snapshots": (commands.add_folder, commands.describe),
    "reconstruct": (commands.add_target, commands.rebuild),
    "merge": (merging.add_arguments, merging.run),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, given by its arguments or `sys.argv`; return the exit status.

    It is 0; 1 after an error, whose text is on stderr; 130 after Ctrl-C. argparse exits with 2.
    """
    parser = argparse.ArgumentParser(
        prog="python -m ema_triton", description="Averages of model weights, after the training."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (add_arguments, run) in COMMANDS.items():
        text = cleandoc(run.__doc__ or "")
        layout = argparse.RawDescriptionHelpFormatter
        add_arguments(
            commands.add_parser(
                name, help=text.partition("\n")[0], description=text, formatter_class=layout
            )
        )
    given = parser.parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: _say(f"\nwarning: {message}\n")
        try:
            result = COMMANDS[given.command][1](given, _progress())
        except KeyboardInterrupt:
            _say("\ninterrupted: nothing was written\n")
            return 130
        except (ImportError, MemoryError, OSError, ValueError) as error:
            _say(f"\nerror: {error}\n")
            return 1
    sys.stdout.write(f"{result}\n")
    return 0


def _say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _progress() -> Callable[[int, int], None]:
    """Show progress on stderr: in place on a terminal, else in a line per tenth."""
    shown, step, end = 0, *((1, "\r") if sys.stderr.isatty() else (10, "\n"))

    def show(done: int, total: int) -> None:
        nonlocal shown
        percent = 100 * done // total
        if percent >= shown + step:
            shown = percent
            _say(f"{percent:3d} %{end}")

    return show
