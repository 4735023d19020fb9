"""What a measurement leaves behind: one JSON file per machine and command."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.machine import Machine

FOLDER = Path(__file__).with_name("results")

# Counts up when a reader of the older files would misread the newer ones.
SCHEMA = 1


@dataclass(frozen=True)
class Spread:
    """Several timings of one thing: how many, and three quantiles in microseconds."""

    count: int
    low: float  # 10 %
    median: float
    high: float  # 90 %

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """The quantiles of samples in microseconds."""
        if len(samples) == 1:
            return cls(1, samples[0], samples[0], samples[0])
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(len(samples), deciles[0], statistics.median(samples), deciles[-1])


@dataclass(frozen=True)
class Row:
    """One peer on one model in one case.

    Attributes:
        model: Name of the model.
        tensors: How many parameters it has, as tensors.
        elements: How many, as numbers.
        case: EMA dtype and online dtype, such as "fp32<-bf16".
        schedule: "constant", or "changing" for a momentum that differs at every update.
        peer: The peer's name, LIMIT, or AGAIN.
        status: "timed", or why not: "absent", "wrong", "error", "skipped".
        reason: What is behind a status other than "timed", or why what was timed has no CUDA graph.
        bytes: What must move: each input once, each output once.
        times: Microseconds by figure. On a CPU "wall" (one update, after the caches were flushed)
            and "repeated" (one of several in a row). On a GPU "device" (between events around an
            eager update), "graph" (the same, replayed as a CUDA graph), both after a flush of the
            L2, and "host" (until the call returned).
        launches: Device kernels, copies and fills per update; None where they are unknown: on a
            CPU, or without CUPTI.
        extra_memory: Peak bytes allocated during an update, beyond those before.
        set_up: Microseconds for copying the model and the first update, with what either compiles.
    """

    model: str
    tensors: int
    elements: int
    case: str
    schedule: str
    peer: str
    status: str
    reason: str = ""
    bytes: int = 0
    times: dict[str, Spread] = field(default_factory=dict)
    launches: int | None = None
    extra_memory: int | None = None
    set_up: float | None = None


# The device copy of as many bytes as an update must move.
LIMIT = "copy of the same bytes"

# A second timing of the first peer: how much of a difference is noise.
AGAIN = "(again)"


@dataclass(frozen=True)
class StepRow:
    """A training step with one peer's update, or with none, in microseconds.

    `added` holds differences to the step without EMA, each to those of the same round: a machine
    that is slower for a second is so for both.
    """

    model: str
    elements: int
    peer: str
    status: str
    reason: str = ""
    step: Spread | None = None
    added: Spread | None = None


# The training step without any EMA, timed twice.
NO_EMA = "without EMA"


@dataclass(frozen=True)
class Results:
    """One run of `python -m bench run` or `step`.

    Attributes:
        kind: "update" or "step".
        machine: Where it ran.
        commit: What was measured.
        date: When, in ISO format.
        rows: A Row, or a StepRow, for each thing measured or not.
    """

    kind: str
    machine: Machine
    commit: str
    date: str
    rows: list[Any]

    def save(self, path: Path) -> None:
        """Write the JSON file, a row per line."""
        head = {key: value for key, value in asdict(self).items() if key != "rows"}
        lines = ",\n".join(json.dumps(_rounded(asdict(row))) for row in self.rows)
        head_text = json.dumps({"schema": SCHEMA, **head}, indent=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        # A run that is cut off while it writes has the file as it was before.
        new = path.with_name(f"{path.name}.new")
        new.write_text(f'{head_text.removesuffix("}").rstrip()},\n "rows": [\n{lines}\n]}}\n')
        new.replace(path)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a file that `save` wrote.

        Raises:
            ValueError: The file is of another schema.
        """
        data = json.loads(path.read_text())
        if data.pop("schema", None) != SCHEMA:
            raise ValueError(f"{path} is not a results file of schema {SCHEMA}. Measure again.")
        data["machine"] = Machine(**data["machine"])
        make = {"update": _row, "step": _step_row}[data["kind"]]
        data["rows"] = [make(row) for row in data["rows"]]
        return cls(**data)


def _row(data: dict[str, Any]) -> Row:
    times = {figure: Spread(**spread) for figure, spread in data.pop("times").items()}
    return Row(**data, times=times)


def _step_row(data: dict[str, Any]) -> StepRow:
    spreads = {key: value and Spread(**value) for key in ("step", "added") for value in [data[key]]}
    return StepRow(**{**data, **spreads})


def _rounded(value: Any) -> Any:  # noqa: ANN401
    """A tenth of a microsecond is below any noise; more digits only make the file longer."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return round(value, 1) if isinstance(value, float) else value


class Lines:
    """Text that is printed and written as it comes, such that a run that is cut off can go on."""

    def __init__(self, path: Path | None, head: str, *, resume: bool) -> None:
        """Begin with the head, which says what was measured where.

        Args:
            path: Where it is written; None for printing alone.
            head: The first line.
            resume: Go on with the file, which has to have this head.

        Raises:
            SystemExit: There is no such file, or it has another head.
        """
        self._path = path
        self._known: set[str] = set()
        if resume:
            if path is None or not path.exists():
                raise SystemExit(f"--resume: there is no results file {path or '(give --out)'}")
            first, *known = path.read_text().splitlines() or [""]
            if first != head:
                raise SystemExit(f"--resume: {path} is of {first!r}, and this is {head!r}")
            self._known = set(known)
        elif path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
        if not resume:
            self.add(head)

    def __contains__(self, line: str) -> bool:
        """Whether the file that a run goes on with has this line."""
        return line in self._known

    def add(self, *lines: str) -> None:
        """Print and write lines that belong together."""
        text = "\n".join(lines)
        print(text, flush=True)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(text + "\n")
