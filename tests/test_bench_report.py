"""What `python -m bench report` writes: results files as tables, pages and pictures."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("tqdm")

from bench import drift, report
from bench.models import COUNTS, SIZES
from bench.results import AGAIN, FOLDER, LIMIT, Results, Row, Spread, StepRow
from tests.test_bench_capture import MACHINE


def row(peer: str, median: float, schedule: str = "constant", **facts) -> Row:
    times = {} if facts.get("status") else {"wall": Spread(9, median, median, median)}
    facts = {"status": "timed", **facts}
    return Row(
        "resnet50", 161, 1000, "fp32<-fp32", schedule, peer, bytes=12_000, times=times, **facts
    )


def made_up() -> Results:
    rows = [
        row(LIMIT, 900.0),
        row("ema_triton (foreach)", 1000.0),
        row(AGAIN, 1100.0),
        row("ema_triton (foreach)", 1010.0, "changing"),
        row("slow", 12_345.0),
        row("slow", 30_000.0, "changing"),
        row("bad", 0.0, status="wrong", reason="tensor 0 is off"),
        row("gone", 0.0, status="absent", reason="ImportError: no"),
        row("close", 1090.0),
        row("close", 1190.0, "changing"),
        row("fixed", 500.0),
        row("fixed", 0.0, "changing", status="error", reason="cannot"),
    ]
    return Results("update", MACHINE, "0123abcd", "2026-01-02", rows)


def test_results_survive_the_file(tmp_path: Path) -> None:
    results = made_up()
    results.save(tmp_path / "new" / "r.json")
    assert Results.load(tmp_path / "new" / "r.json") == results
    spread = Spread(2, 1.0, 2.0, 3.0)
    steps = [StepRow("cnn", 5, "p", "timed", "", spread, spread), StepRow("cnn", 5, "q", "absent")]
    results = replace(results, kind="step", rows=steps)
    results.save(tmp_path / "s.json")
    assert Results.load(tmp_path / "s.json") == results
    (tmp_path / "s.json").write_text(
        (tmp_path / "s.json").read_text().replace('"schema": 1', '"schema": 0')
    )
    with pytest.raises(ValueError, match=r"not a results file of schema 1\. Measure again"):
        Results.load(tmp_path / "s.json")


def test_the_table_says_everything() -> None:
    text = report.table(made_up())
    for line in (
        "Slow, 2 cores, 16 GiB, 2 CPU cores; Python 3.12, torch 2; commit 0123abcd, 2026-01-02.",
        "| ema_triton (foreach) | 1 |",
        "| slow | 12.3 (12×) |",
        "| fixed | 0.5 (0.50×) |",
        "| copy of the same bytes | 0.9 (0.90×) |",
        "| close | 1.09 (=) |",
        "| *noise floor* | 1.10× |",
        "| fp32<-fp32 | 0.012, 90% |",
        "span 0% of the median",
        "- slow: a λ that changes at every update costs 2.4×.",
        "- fixed: no λ that changes, cannot.",
        "- bad: wrong, not timed (fp32<-fp32).",
        "- gone: absent, ImportError: no (fp32<-fp32).",
    ):
        assert line in text, line
    assert "| bad |" not in text
    assert AGAIN not in text


def committed() -> list[Results]:
    files = sorted(FOLDER.glob("*.json"))
    assert files
    return [Results.load(path) for path in files]


@pytest.mark.parametrize("device", report.PAGES)
def test_the_pages_are_what_the_committed_results_say(device: str) -> None:
    found = [results for results in committed() if results.machine.device == device]
    page = (report.DOCS / report.PAGES[device]).read_text()
    assert report.with_section(page, report.section(found)) == page
    # A control: another figure in a file would be noticed.
    changed = next(results for results in found if results.kind == "update")
    spread = Spread(1, 1e9, 1e9, 1e9)
    rows = [replace(r, times=dict.fromkeys(r.times, spread)) for r in changed.rows]
    other = [replace(r, rows=rows) if r is changed else r for r in found]
    assert report.with_section(page, report.section(other)) != page
    for path in FOLDER.glob(f"{changed.machine.slug}*.png"):
        assert f"({report.link(path)})" in page


def test_no_table_of_a_cpu_is_on_the_page_of_a_gpu() -> None:
    pages = {device: (report.DOCS / name).read_text() for device, name in report.PAGES.items()}
    for results in committed():
        for device, page in pages.items():
            assert (results.machine.name in page) == (device == results.machine.device)
    assert pages["cuda"].count("ot measured on a GPU") == 1
    assert all(page.count("\n") <= 250 for page in pages.values())


def unfounded(page: str) -> list[str]:
    """The measured numbers in the text of a page that no table below it has."""
    text, _, tables = page.partition(report.BEGIN)
    found = set(re.findall(NUMBER, tables))
    return [number for number in re.findall(NUMBER, text) if number not in found]


NUMBER = r"[+-]?\d+\.\d+×?|\d+[%×]"


@pytest.mark.parametrize("name", report.PAGES.values())
def test_the_text_names_no_number_that_is_not_in_a_table(name: str) -> None:
    page = (report.DOCS / name).read_text()
    assert unfounded(page) == []
    assert len(re.findall(NUMBER, page.partition(report.BEGIN)[0])) >= 3
    assert unfounded(f"It takes 0.123456 ms, or 12.3× as long, or 123%.\n{page}") == [
        *("0.123456", "12.3×", "123%")
    ]


def test_the_page_has_the_committed_drift() -> None:
    points = drift.load(FOLDER / "drift.csv")
    page = drift.PAGE.read_text()
    markers = (drift.BEGIN, drift.END)
    assert report.with_section(page, drift.section(points), *markers) == page
    other = [replace(point, rms=point.rms + 1) for point in points]
    assert report.with_section(page, drift.section(other), *markers) != page


def test_no_name_is_in_italics() -> None:
    rows = [row("torch._foreach_lerp_", 1.0), row("foreach_mul (_x)", 2.0)]
    text = report.section([Results("update", MACHINE, "c", "d", rows)])
    assert r"| torch.\_foreach_lerp\_ |" in text
    assert r"| foreach_mul (\_x) |" in text
    assert "| torch._foreach_lerp_ |" in report.table(Results("update", MACHINE, "c", "d", rows))


def test_a_page_without_markers_is_an_error() -> None:
    with pytest.raises(ValueError, match="must have the lines"):
        report.with_section("nothing here", "new")


def test_report_writes_pictures_and_the_page_of_the_device(tmp_path: Path) -> None:
    made_up().save(tmp_path / "r.json")
    page, of_gpu = (tmp_path / report.PAGES[device] for device in ("cpu", "cuda"))
    for path in (page, of_gpu):
        path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.main(SimpleNamespace(files=[tmp_path / "r.json"], out=tmp_path, docs=tmp_path))
    assert "\nold\n" in of_gpu.read_text()  # no GPU is in the file
    text = page.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n## One update on Slow, 2 cores\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "\nold\n" not in text
    (picture,) = tmp_path.glob("*.png")  # the sweeps were not measured
    assert picture.name == "slow-2-cores-speedup.png"
    assert picture.stat().st_size > 5000
    assert f"(../bench/results/{picture.name})" in text


def test_each_sweep_has_its_picture(tmp_path: Path) -> None:
    rows = [
        replace(row(peer, time), model=model.name, tensors=len(model.shapes))
        for model in (COUNTS[0], COUNTS[3], SIZES[0], SIZES[2])
        for peer, time in ((LIMIT, 900.0), ("ema_triton (foreach)", 1000.0), ("slow", 5000.0))
    ]
    paths = report.draw(replace(made_up(), rows=rows), tmp_path)
    names = ["slow-2-cores-bandwidth.png", "slow-2-cores-tensors.png"]
    assert [path.name for path in paths] == names
