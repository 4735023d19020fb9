"""`python -m bench report`: the tables and pictures of results files, and the pages with them."""

from __future__ import annotations

import argparse
import math
import re
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import noise
from bench.models import ARCHITECTURES, COUNTS, MANY_SMALL, SIZES, Model
from bench.results import AGAIN, FOLDER, LIMIT, NO_EMA, Results, Row, Spread, StepRow

# Tables are printed where matplotlib is not installed, too.
if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# A page for each kind of device: no table of a CPU stands under a headline of a GPU.
PAGES = {"cuda": "benchmarks.md", "cpu": "benchmarks-cpu.md"}
BEGIN, END = "<!-- python -m bench report -->", "<!-- end of the report -->"

# What is measured, by kind of device; the first is shown for every case and in the pictures.
FIGURES = {
    "cpu": {"wall": "one update", "repeated": "one of several updates in a row, caches warm"},
    "cuda": {
        "device": "device time of an eager update",
        "graph": "device time of a replayed CUDA graph",
        "host": "host time until the call returns",
    },
}
MAIN_FIGURE = {device: next(iter(figures)) for device, figures in FIGURES.items()}
FIRST_CASE = "fp32<-fp32"

# Peers whose time a changing momentum raises by more than this are named.
CHANGING_COSTS = 1.25

# What the tables and the first picture show; the sweeps have a picture each.
SPEEDUP = [*ARCHITECTURES, MANY_SMALL]

OURS = ("ema_triton (triton)", "ema_triton (foreach)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where the pictures go")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the pages are")


def main(args: argparse.Namespace) -> None:
    """Draw the pictures, replace the section of each page whose kind of device was measured."""
    found = [Results.load(path) for path in args.files]
    for results in found:
        for path in draw(results, args.out):
            print(f"picture: {path}")
    for device, name in PAGES.items():
        if measured := [results for results in found if results.machine.device == device]:
            page = args.docs / name
            page.write_text(with_section(page.read_text(), section(measured)))
            print(f"page: {page}")


def with_section(page: str, new: str, first: str = BEGIN, last: str = END) -> str:
    """The page with `new` between its markers.

    Raises:
        ValueError: A marker is missing.
    """
    before, begin, rest = page.partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise ValueError(f"The page must have the lines {first} and {last}, in this order.")
    return f"{before}{begin}\n{new}\n{end}{after}"


def section(found: list[Results]) -> str:
    """A page's tables and pictures: what was measured on one kind of device."""
    parts = []
    for results in sorted(found, key=lambda one: (one.machine.slug, one.kind == "step")):
        heading = "One update" if results.kind == "update" else "A training step"
        parts += [f"## {heading} on {results.machine.name}", table(results)]
        if results.kind == "update":
            shown = _pictures(results).values()
            parts.append("\n".join(f"![{title}]({link(path)})" for title, path in shown))
    # Else the name torch._foreach_lerp_ is half in italics.
    return re.sub(r"(?<=\w)_(?!\w)|(?<!\w)_(?=\w)", r"\\_", "\n\n".join(parts))


def link(picture: Path) -> str:
    """Where a picture is, seen from a page."""
    return f"../{picture.relative_to(ROOT)}"


def table(results: Results) -> str:
    """What was measured, as markdown."""
    if results.kind == "step":
        return _step_tables(results)
    tables = _update_tables(results) if results.rows else []
    return "\n\n".join([_provenance(results), *tables, _remarks(results)])


def _provenance(results: Results) -> str:
    machine = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    driver = f", driver {machine.driver}, CUDA {machine.cuda}" if machine.driver else ""
    return (
        f"{machine.name}, {machine.memory / 2**30:.0f} GiB, {machine.cores} CPU cores{driver}; "
        f"Python {machine.python}, {versions}; commit {results.commit}, {results.date}."
    )


def _update_tables(results: Results) -> list[str]:
    """Tables of peers by models: every figure of the first case, the main one of the others."""
    figures = FIGURES[results.machine.device]
    cases = dict.fromkeys(row.case for row in results.rows)
    tables = [
        _update_table(results, case, figure, meaning)
        for case in cases
        for figure, meaning in figures.items()
        if case == FIRST_CASE or figure == MAIN_FIGURE[results.machine.device]
    ]
    if results.machine.device == "cuda":
        tables.append(_cost_table(results))
    return [*tables, _rate_table(results)]


def _rate_table(results: Results) -> str:
    """How close ours comes to the memory's limit, in every case."""
    figure = MAIN_FIGURE[results.machine.device]
    cases = [*dict.fromkeys(row.case for row in results.rows)]
    models, floors = _grid(results, cases[0], figure)[0], noise.floors(results)
    lines = ["**Ours**, GB/s of the bytes that must move, and share of a copy of as many bytes"]
    lines += ["", *_head(models)]
    for case in cases:
        _, _, cells = _grid(results, case, figure)
        texts = []
        for model in models:
            best, limit = _best(cells, model, figure), cells.get((LIMIT, model))
            if best is None or limit is None:
                texts.append("–")
            else:
                ours, copy = best.times[figure], limit.times[figure]
                share = f"{copy.median / ours.median:.0%}"
                if not noise.differ(ours, copy, floors[model, figure]):
                    share = noise.EQUAL
                texts.append(f"{best.bytes / ours.median / 1e3:.3g}, {share}")
        lines.append(f"| {case} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _update_table(results: Results, case: str, figure: str, meaning: str) -> str:
    """Medians of one figure in one case."""
    models, names, cells = _grid(results, case, figure)
    floors = noise.floors(results)
    floor = [floors[model, figure] for model in models]
    lines = [f"**{case}** (EMA ← online), {meaning}; milliseconds, and times the fastest of ours"]
    lines += ["", *_head(models)]
    for name in names:
        texts = [
            _cell(cells.get((name, model)), _best(cells, model, figure), figure, least)
            for model, least in zip(models, floor, strict=True)
        ]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    texts = [f"{least:.2f}×" if least < math.inf else "unknown" for least in floor]
    lines.append("| *noise floor* | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _cost_table(results: Results) -> str:
    """What else an update costs on a GPU."""
    models, names, cells = _grid(results, FIRST_CASE, "device")
    lines = [f"**{FIRST_CASE}**, launches and extra MiB per update; milliseconds to set up"]
    lines += ["", *_head(models)]
    for name in names:
        if name == LIMIT:
            continue
        texts = []
        for model in models:
            row = cells.get((name, model))
            if row is None or None in (row.extra_memory, row.set_up):
                texts.append("–")
            else:
                launches = "unknown" if row.launches is None else row.launches
                memory, first = row.extra_memory / 2**20, row.set_up / 1e3
                texts.append(f"{launches}; {memory:.3g}; {first:.3g}")
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _grid(
    results: Results, case: str, figure: str
) -> tuple[list[str], list[str], dict[tuple[str, str], Row]]:
    """Models, peers, and the rows of both where the figure was timed with a constant momentum."""
    rows = [
        row
        for row in results.rows
        if row.case == case and row.schedule == "constant" and figure in row.times
    ]
    measured = dict.fromkeys(row.model for row in rows)
    shown = [model.name for model in SPEEDUP if model.name in measured]
    models = shown or [*measured]
    names = [*dict.fromkeys(r.peer for r in rows if r.model in models and r.peer != AGAIN)]
    names.sort(key=lambda name: name == LIMIT)
    return models, names, {(row.peer, row.model): row for row in rows}


def _head(models: list[str]) -> list[str]:
    return ["| | " + " | ".join(models) + " |", "|---|" + "---|" * len(models)]


def _best(cells: dict[tuple[str, str], Row], model: str, figure: str) -> Row | None:
    """The faster of our backends on this model."""
    ours = [row for name in OURS if (row := cells.get((name, model))) and figure in row.times]
    return min(ours, key=lambda row: row.times[figure].median, default=None)


def _cell(row: Row | None, best: Row | None, figure: str, floor: float) -> str:
    if row is None:
        return "–"
    time = row.times[figure]
    text = _milliseconds(time.median)
    if best is None or row is best:
        return text
    ours = best.times[figure]
    if not noise.differ(time, ours, floor):
        return f"{text} ({noise.EQUAL})"
    return f"{text} ({_ratio(time.median / ours.median)}×)"


def _main_spread(row: Row) -> Spread:
    return row.times["device" if "device" in row.times else "wall"]


def _milliseconds(microseconds: float) -> str:
    milliseconds = microseconds / 1e3
    return f"{milliseconds:.3g}" if milliseconds < 100 else f"{milliseconds:.0f}"


def _ratio(ratio: float) -> str:
    digits = 0 if ratio >= 9.95 else 1 if ratio >= 1.095 else 2 if ratio >= 0.0095 else 3
    return f"{ratio:.{digits}f}"


def _remarks(results: Results) -> str:
    """What the tables leave out: noise, rates, changing momenta, refusals."""
    figure = MAIN_FIGURE[results.machine.device]
    timed = [row for row in results.rows if row.times]
    if not timed:
        return "\n".join(["- Nothing was timed.", *_refusals(results.rows)])
    counts = [row.times[figure].count for row in timed]
    lines = [
        f"- Each is the median of {min(counts)} to {max(counts)} updates, caches flushed before "
        "each, peers taking turns; 10 % to 90 % of the timings span "
        f"{statistics.median(map(_span, timed)):.0%} of the median (median over all). Every "
        "peer's EMA was held against float64 first.",
        f"- {noise.EQUAL}: not told apart. The medians are within the noise floor, by which two "
        "timings of the same update differ, or one is among the other's 10 % to 90 %.",
    ]
    graphless = {(row.peer, row.reason): None for row in timed if row.reason}
    lines += [f"- {peer}: {reason}." for peer, reason in graphless]
    lines += _changing(results, figure)
    return "\n".join([*lines, *_refusals(results.rows)])


def _refusals(rows: list[Row]) -> list[str]:
    """Who was not timed, and why: peers with the same reason in the same cases in one line."""
    cases: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        if row.peer == LIMIT and row.status != "timed":
            cases.setdefault((f"{row.status}, {row.reason}", row.model), {})[row.case] = None
        elif row.status != "timed" and row.schedule == "constant":
            # How far off a wrong one is, and on which tensor, differs from model to model.
            reason = "not timed" if row.status == "wrong" else row.reason
            cases.setdefault((f"{row.status}, {reason}", row.peer), {})[row.case] = None
    names: dict[tuple[str, str], list[str]] = {}
    for (reason, name), found in cases.items():
        names.setdefault((reason.rstrip("."), ", ".join(found)), []).append(name)
    return [f"- {', '.join(who)}: {why} ({where})." for (why, where), who in names.items()]


def _span(row: Row) -> float:
    spread = _main_spread(row)
    return (spread.high - spread.low) / spread.median


def _changing(results: Results, figure: str) -> list[str]:
    """What a momentum that changes at every update does to the peers that take a constant one."""
    pairs: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in results.rows:
        if row.peer not in (LIMIT, AGAIN):
            pairs.setdefault((row.peer, row.model, row.case), {})[row.schedule] = row
    floors = noise.floors(results)
    ratios: dict[str, list[float]] = {}
    lines: dict[str, None] = {}
    for (peer, model, _), both in pairs.items():
        constant, changing = both["constant"], both.get("changing")
        if not constant.times or changing is None:
            continue
        if changing.times:
            times = changing.times[figure], constant.times[figure]
            costs = noise.differ(*times, floors[model, figure])
            ratio = times[0].median / times[1].median if costs else 1.0
            ratios.setdefault(peer, []).append(ratio)
        else:
            lines[f"- {peer}: no λ that changes, {changing.reason}."] = None
    costly = {peer: statistics.median(found) for peer, found in ratios.items()}
    for peer, ratio in costly.items():
        if ratio > CHANGING_COSTS:
            lines[f"- {peer}: a λ that changes at every update costs {_ratio(ratio)}×."] = None
    return [*lines] or ["- A λ that changes at every update costs no peer more."]


def _step_tables(results: Results) -> str:
    rows: list[StepRow] = results.rows
    models = [*dict.fromkeys(row.model for row in rows)]
    cells = {(row.peer, row.model): row for row in rows}
    lines = [
        _provenance(results),
        "",
        "A step is forward, backward and AdamW in fp32; milliseconds that the EMA adds to it "
        f"(median over rounds), and percent of the step. {noise.EQUAL} is what is not told from "
        "the noise: 10 % to 90 % of what a second training without EMA adds.",
        "",
        *_head(models),
    ]
    for peer in dict.fromkeys(row.peer for row in rows if row.step is not None):
        texts = []
        for model in models:
            row, bare = cells[peer, model], cells[NO_EMA, model]
            if row.step is None or row.added is None or bare.step is None:
                texts.append(row.status)
            elif peer == NO_EMA:
                texts.append(f"step: {_milliseconds(row.step.median)}")
            elif peer == AGAIN:
                texts.append(f"{row.added.low / 1e3:+.2f} to {row.added.high / 1e3:+.2f}")
            elif not noise.adds(row, rows):
                texts.append(noise.EQUAL)
            else:
                added = row.added.median
                texts.append(f"{added / 1e3:+.2f} ({added / bare.step.median:+.1%})")
        name = "*noise*" if peer == AGAIN else peer
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    reasons = dict.fromkeys(
        f"- {row.peer}: {row.status}, {row.reason}." for row in rows if row.step is None
    )
    if reasons:
        lines += ["", *reasons]
    return "\n".join(lines)


def _pictures(results: Results) -> dict[str, tuple[str, Path]]:
    """Name, title and path of each picture whose models were measured."""
    models = {
        "speedup": ("Time of one update, relative to ours", SPEEDUP),
        "bandwidth": ("Share of the copy's bandwidth against the number of parameters", SIZES),
        "tensors": ("Microseconds against the number of tensors", COUNTS),
    }
    return {
        name: (title, FOLDER / f"{results.machine.slug}-{name}.png")
        for name, (title, shown) in models.items()
        if any(set(rows) - {LIMIT} for rows in [_timed(results, shown)])
    }


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw the pictures of an "update" run into the folder; return their paths."""
    if results.kind != "update":
        return []
    from matplotlib.figure import Figure

    drawings = {"speedup": _draw_speedup, "bandwidth": _draw_bandwidth, "tensors": _draw_tensors}
    paths = []
    for name, (title, path) in _pictures(results).items():
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        drawings[name](results, axes)
        axes.set_title(f"{title}\n{results.machine.name}", fontsize=10)
        paths.append(folder / path.name)
        figure.savefig(paths[-1], dpi=130)
    return paths


def _timed(results: Results, models: list[Model]) -> dict[str, dict[str, Row]]:
    """Rows of the first case, constant momentum, by peer and model."""
    names = {model.name for model in models}
    found: dict[str, dict[str, Row]] = {}
    for row in results.rows:
        shown = row.case == FIRST_CASE and row.schedule == "constant" and row.peer != AGAIN
        if row.times and shown and row.model in names:
            found.setdefault(row.peer, {})[row.model] = row
    return found


def _draw_speedup(results: Results, axes: Axes) -> None:
    figure = MAIN_FIGURE[results.machine.device]
    timed = _timed(results, SPEEDUP)
    cells = {(peer, model): row for peer, rows in timed.items() for model, row in rows.items()}
    models = [model.name for model in SPEEDUP if _best(cells, model.name, figure)]
    peers = [peer for peer in timed if peer not in (LIMIT, *OURS)]
    height, floors = 0.8 / max(len(peers), 1), noise.floors(results)
    for index, peer in enumerate(peers):
        where, ratios, color = [], [], _color(peer, peers)
        for place, model in enumerate(models):
            best, row = _best(cells, model, figure), cells.get((peer, model))
            if best is None or row is None:
                continue
            times = row.times[figure], best.times[figure]
            at = place + (index - (len(peers) - 1) / 2) * height
            if noise.differ(*times, floors[model, figure]):
                where.append(at)
                ratios.append(times[0].median / times[1].median)
            else:
                axes.text(1, at, noise.EQUAL, color=color, ha="center", va="center", weight="bold")
        axes.barh(where, [ratio - 1 for ratio in ratios], height * 0.9, left=1, color=color)
        axes.barh(0, 0, label=peer, color=color)  # the legend's, where it has none of its own
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("times as long as ours (fp32←fp32); = is within the noise")
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.set_yticks(range(len(models)), models)
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    axes.grid(axis="x", alpha=0.3, which="both")


def _draw_bandwidth(results: Results, axes: Axes) -> None:
    timed = _timed(results, SIZES)
    limits = timed.get(LIMIT, {})
    for peer, rows in timed.items():
        if peer != LIMIT:
            shares = [
                100 * _main_spread(limits[name]).median / _main_spread(row).median
                for name, row in rows.items()
            ]
            _line(axes, peer, [*timed], [row.elements for row in rows.values()], shares)
    axes.axhline(100, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("parameters, in one tensor (fp32←fp32)")
    axes.set_ylabel("% of a copy of the same bytes")
    _finish(axes)


def _draw_tensors(results: Results, axes: Axes) -> None:
    figure = {"cpu": "wall", "cuda": "host"}[results.machine.device]
    timed = _timed(results, COUNTS)
    for peer, rows in timed.items():
        if peer != LIMIT:
            times = [row.times[figure].median for row in rows.values()]
            _line(axes, peer, [*timed], [row.tensors for row in rows.values()], times)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tensors of 1024 elements (fp32←fp32)")
    axes.set_ylabel(f"{figure} time, microseconds")
    _finish(axes)


def _line(axes: Axes, peer: str, peers: list[str], x: list[int], y: list[float]) -> None:
    width = 3 if peer in OURS else 1
    axes.plot(
        x, y, marker="o", markersize=4, label=peer, linewidth=width, color=_color(peer, peers)
    )


def _color(peer: str, peers: list[str]) -> Any:  # noqa: ANN401
    """Black and gray for ours; the others have the same order, and so color, in every picture."""
    from matplotlib import colormaps

    if peer in OURS:
        return ("black", "dimgray")[OURS.index(peer)]
    return colormaps["tab20"]([name for name in peers if name not in (LIMIT, *OURS)].index(peer))


def _finish(axes: Axes) -> None:
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    axes.grid(alpha=0.3)
