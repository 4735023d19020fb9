"""`bench around` shows what stands around an update, line by line, as far as it fits."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import around, jobs, measure
from bench.measure import Stopwatch
from bench.models import MODELS, Model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TINY = Model("tiny", {"a.weight": (8, 8), "b.weight": (3,)})

# Three updates' bytes, a swap of both sides twice, a distance that reads both, a state, its copy.
PER_ELEMENT = {
    "copy": (12, 10),
    "update": (12, 10),
    "swapped(), in and out": (32, 16),
    "distance()": (8, 6),
    "state_dict()": (0, 0),
    "update, guarded": (12, 10),
    "state_dict(clone=True)": (8, 8),
}


@pytest.mark.parametrize("memory", [10**9, None], ids=["together", "in stages"])
@pytest.mark.parametrize("name", around.CASES)
def test_what_stands_around_an_update_is_timed(name: str, memory: int | None) -> None:
    case = around.CASES[name]
    if memory is None:
        largest = max(around.needed(TINY, case, stage) for stage in around.STAGES)
        memory = int(largest / jobs.CPU_SHARE) + 1
        every = tuple(job for stage in around.STAGES for job in stage)
        assert around.needed(TINY, case, every) > largest
    stopwatch = Stopwatch(CPU, 1000)
    found = [*around.measured(TINY, case, stopwatch, rounds=1, seconds=60.0, memory=memory)]
    column = [*around.CASES].index(name)
    assert [(job, per_element) for job, _, per_element, _ in found] == [
        (job, per_element[column]) for job, per_element in PER_ELEMENT.items()
    ]
    assert all(microseconds > 0 for _, microseconds, _, _ in found)


def test_what_does_not_fit_is_skipped_with_the_reason() -> None:
    case = around.CASES["fp32<-fp32"]
    # Enough for one EMA, and not for a copy of it beside, nor for the benchmark's.
    memory = int(around.needed(TINY, case, ("update",)) / jobs.CPU_SHARE) + 1
    found = around.measured(TINY, case, Stopwatch(CPU, 1000), 1, 60.0, memory)
    reasons = {job: (microseconds is None, reason) for job, microseconds, _, reason in found}
    skipped = (True, "skipped: it needs 0.0 GiB, of 0.0 GiB that are free")
    assert reasons == dict.fromkeys(PER_ELEMENT, skipped) | {"update, guarded": (False, "")}


def test_seven_billion_parameters_fit_into_78_gib_in_stages() -> None:
    room = jobs.usable(78 << 30, CUDA)
    for case in around.CASES.values():
        for stage in around.STAGES:
            assert around.needed(MODELS["llama-7b"], case, stage) <= room
    every = tuple(job for stage in around.STAGES for job in stage)
    assert around.needed(MODELS["llama-7b"], around.CASES["fp32<-fp32"], every) > room


def test_a_stage_that_fails_costs_no_other_one_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    case = around.CASES["fp32<-fp32"]
    largest = max(around.needed(TINY, case, stage) for stage in around.STAGES)
    timed = measure.interleaved

    def fails(subjects: dict, *rest: object) -> dict:
        if around.GUARDED in subjects:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return timed(subjects, *rest)

    monkeypatch.setattr(measure, "interleaved", fails)
    memory = int(largest / jobs.CPU_SHARE) + 1
    found = around.measured(TINY, case, Stopwatch(CPU, 1000), 1, 60.0, memory)
    failed = {job: reason for job, microseconds, _, reason in found if microseconds is None}
    assert failed == {around.GUARDED: "failed: OutOfMemoryError: CUDA out of memory"}


def test_lines() -> None:
    # 67 elements of 12 bytes in 2 ms.
    shown = around.line("tiny update", TINY, 2000.0, 12).split()
    assert shown == ["tiny", "update", "2.000", "12", "0.0"]
    assert around.line("", TINY, 1.0, 12).split()[-1] == "0.8"
    assert around.line("a", TINY, None, 0, "skipped").split() == ["a", "skipped"]


def test_a_cut_off_loses_no_line_and_is_gone_on_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MODELS, "tiny", TINY)
    out = tmp_path / "new" / "around.txt"
    cases = []

    def cut_off(model: Model, case: object, *rest: object) -> Iterator[tuple]:
        cases.append(next(name for name, one in around.CASES.items() if one == case))
        yield "update", 2000.0, 12, ""
        if len(cases) == 2:
            assert out.read_text().endswith("12      0.0\n")  # written before the next is timed
            raise KeyboardInterrupt
        yield "distance()", None, 0, "skipped: it is too large"

    monkeypatch.setattr(around, "measured", cut_off)
    args = {"models": "tiny", "device": "cpu", "quick": True, "out": out}
    with pytest.raises(KeyboardInterrupt):
        around.main(SimpleNamespace(**args, resume=False))
    before = out.read_text()
    assert capsys.readouterr().out == before
    assert before.count("tiny fp32<-fp32") == 3  # two lines, and that it is done
    around.main(SimpleNamespace(**args, resume=True))
    assert cases == ["fp32<-fp32", "bf16<-bf16 exact", "bf16<-bf16 exact"]
    after = out.read_text()
    assert after.startswith(before)
    assert after.count("GB/s") == 1
    assert after.endswith(": it is too large\ntiny bf16<-bf16 exact: done\n")
    out.write_text(after.replace("commit", "another commit"))
    with pytest.raises(SystemExit, match=r"--resume: .* is of '.*another commit"):
        around.main(SimpleNamespace(**args, resume=True))
    with pytest.raises(SystemExit, match=r"there is no results file \(give --out\)"):
        around.main(SimpleNamespace(**{**args, "out": None}, resume=True))
