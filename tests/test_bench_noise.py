"""The noise floor: what two timings do not tell apart is neither a win nor a loss."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("tqdm")

from bench import noise, report
from bench.results import AGAIN, FOLDER, NO_EMA, Results, Row, Spread, StepRow
from tests.test_bench_capture import MACHINE


def spread(median: float, below: float = 0.0, above: float = 0.0) -> Spread:
    return Spread(9, median - below, median, median + above)


def timed(peer: str, wall: Spread, case: str = "fp32<-fp32") -> Row:
    return Row("resnet50", 161, 1000, case, "constant", peer, "timed", "", 12_000, {"wall": wall})


def results(*rows: Row) -> Results:
    return Results("update", MACHINE, "0123abcd", "2026-01-02", [*rows])


OURS = "ema_triton (foreach)"


def test_the_floor_is_the_largest_factor_between_two_timings_of_one_update() -> None:
    found = noise.floors(
        results(
            timed(OURS, spread(100)),
            timed(AGAIN, spread(80)),  # faster by 1.25
            timed("other", spread(500)),
            timed(OURS, spread(100), "bf16<-bf16"),
            timed(AGAIN, spread(110), "bf16<-bf16"),
        )
    )
    assert dict(found) == {("resnet50", "wall"): 1.25}
    assert found["vit-l16", "wall"] == math.inf


@pytest.mark.parametrize(
    ("one", "other", "differs"),
    [
        (spread(130), spread(100), True),
        (spread(100), spread(130), True),
        (spread(125), spread(100), False),  # as far as the floor
        (spread(100), spread(125), False),
        (spread(150, above=500), spread(100, below=90), True),  # the ranges are elsewhere
        (spread(150, below=50), spread(100), False),
        (spread(150), spread(100, above=50), False),
        (spread(150, below=49, above=1), spread(100, above=49), True),  # they only overlap
    ],
)
def test_what_differs(one: Spread, other: Spread, differs: bool) -> None:
    assert noise.differ(one, other, 1.25) is differs
    assert noise.differ(one, other, math.inf) is False


def test_a_table_has_no_ratio_within_the_noise() -> None:
    rows = [
        timed(OURS, spread(1000)),
        timed(AGAIN, spread(1250)),
        timed("a little slower", spread(1240)),
        timed("a little faster", spread(810)),
        timed("slower", spread(1260)),
        timed("faster", spread(790)),
        timed("slower in the mean", spread(2000, below=1000)),
    ]
    text = report.table(results(*rows))
    for line in (
        "| a little slower | 1.24 (=) |",
        "| a little faster | 0.81 (=) |",
        "| slower | 1.26 (1.3×) |",
        "| faster | 0.79 (0.79×) |",
        "| slower in the mean | 2 (=) |",
        "| *noise floor* | 1.25× |",
        "- =: not told apart.",
    ):
        assert line in text, line
    # Where nothing was timed twice, nothing is claimed.
    text = report.table(results(rows[0], timed("slow", spread(9999))))
    assert "| slow | 10 (=) |" in text
    assert "| *noise floor* | unknown |" in text


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_no_two_timings_of_one_update_are_called_different(path: Path) -> None:
    """A negative control: in committed results the same update, timed twice, is always "="."""
    found = Results.load(path)
    if found.kind == "step":
        assert not [row for row in found.rows if row.peer == AGAIN and noise.adds(row, found.rows)]
        return
    floors, pairs = noise.floors(found), [*noise.pairs(found)]
    assert len(pairs) > 100
    for model, figure, first, again in pairs:
        assert not noise.differ(first, again, floors[model, figure])
    # And a control of that: against a floor of another model, many would be.
    least = min(floors.values())
    assert sum(noise.differ(first, again, least) for *_, first, again in pairs) > 10


def test_a_changing_momentum_costs_nothing_within_the_noise() -> None:
    def text(changing: float) -> str:
        slow = timed("slow", spread(2000))
        later = replace(slow, schedule="changing", times={"wall": spread(changing)})
        return report.table(
            results(timed(OURS, spread(1000)), timed(AGAIN, spread(1500)), slow, later)
        )

    assert "A λ that changes at every update costs no peer more." in text(2900)
    assert "- slow: a λ that changes at every update costs 1.6×." in text(3200)


def test_a_training_step_to_which_noise_is_added() -> None:
    step = spread(10_000)
    rows = [
        StepRow("cnn", 5, peer, "timed", "", step, added)
        for peer, added in (
            (NO_EMA, spread(0)),
            (AGAIN, spread(-20, 80, 520)),
            ("within the noise", spread(400)),
            ("not always", spread(600, below=700)),
            ("slower", spread(600, below=100)),
            ("faster", spread(-200, above=100)),
        )
    ]
    text = report.table(Results("step", MACHINE, "c", "d", rows))
    for line in (
        "| without EMA | step: 10 |",
        "| *noise* | -0.10 to +0.50 |",
        "| within the noise | = |",
        "| not always | = |",
        "| slower | +0.60 (+6.0%) |",
        "| faster | -0.20 (-2.0%) |",
    ):
        assert line in text, line
    unknown = report.table(Results("step", MACHINE, "c", "d", [rows[0], rows[4]]))
    assert "| slower | = |" in unknown


def test_the_picture_has_no_bar_within_the_noise(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    rows = [
        timed(OURS, spread(1000)),
        timed(AGAIN, spread(1250)),
        timed("close", spread(1240)),
        timed("slow", spread(3000)),
    ]
    report._draw_speedup(results(*rows), axes)
    lengths = [bar.get_width() for bar in axes.patches if bar.get_width()]
    assert lengths == [2.0]
    assert [text.get_text() for text in axes.texts] == ["="]
    shown = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    assert {*shown} == {"close", "slow"}
    colors = {name: bars.patches[0].get_facecolor() for name, bars in shown.items()}
    assert colors["close"] != colors["slow"]


def test_the_page_says_what_the_sign_means() -> None:
    page = (report.DOCS / report.PAGES["cuda"]).read_text()
    assert re.search(r"\*\*\(=\)\*\* is neither a win nor a loss", page)
    assert "(`bench/noise.py`)" in page
