"""`python -m bench run --averages`: bytes, ratios, and what it times is the same to the bit."""

import re
from types import SimpleNamespace

import pytest
import torch

from bench import averages, run
from bench.cases import CASES
from bench.measure import Stopwatch
from bench.models import MODELS
from bench.results import Spread
from ema_triton import EMABank

SMALL = MODELS["1000x64"]


def test_bytes_per_element() -> None:
    # Online weights 4 bytes, each average 4 in and 4 out; read once for up to three of them.
    expected = {1: (12, 12), 2: (20, 24), 3: (28, 36), 4: (40, 48)}
    case = CASES["fp32<-fp32"]
    for count, (at_once, one_by_one) in expected.items():
        assert averages.moved(case, count, reads_once=True) == at_once
        assert averages.moved(case, count, reads_once=False) == one_by_one
    assert averages.moved(CASES["bf16<-bf16 exact"], 3, reads_once=True) == 2 + 3 * 8


@pytest.mark.parametrize("text", ["", "0", "1,x", "1,,2", "8", "-1"])
def test_counts_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(SystemExit, match="--averages: numbers from 1 to 7, as 1,2,3, but got"):
        averages.parse(text)
    assert averages.parse("1,3") == [1, 3]


def test_a_ratio_within_the_noise_is_marked() -> None:
    fast, slow, both = Spread(9, 1, 2, 3), Spread(9, 4, 5, 6), Spread(9, 1, 3, 5)
    assert averages.Timed(2, fast, slow, fast).ratio == "2.50"
    assert averages.Timed(2, slow, fast, fast).ratio == "0.40"
    assert averages.Timed(2, fast, both, fast).ratio == "=1.50"


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    stopwatch = Stopwatch(torch.device("cpu"), 1024)
    cases = {name: CASES[name] for name in ("fp32<-fp32", "bf16<-bf16 exact")}
    averages.main([SMALL], cases, [1, 2], stopwatch, rounds=1, seconds=0.0)
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 8
    assert rows[2].split() == ["1000x64", "fp32<-fp32", "2", "24", "/", "24"]
    number = r"\d+\.\d{3} \(\d+\.\d{3} \.\. \d+\.\d{3}\)"
    assert all(re.fullmatch(rf" +{number}, {number}, {number}; =?\d+\.\d\d", r) for r in rows[1::2])


def test_averages_that_differ_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    update = EMABank.update
    monkeypatch.setattr(EMABank, "update", lambda self: update(self, dict.fromkeys(self, 0.5)))
    stopwatch = Stopwatch(torch.device("cpu"), 1024)
    with pytest.raises(AssertionError, match=r"^the average of momentum 0.0001 differs$"):
        averages.measured(SMALL, CASES["fp32<-fp32"], 2, stopwatch, rounds=1, seconds=0.0)


def test_run_hands_over(capsys: pytest.CaptureFixture[str]) -> None:
    given = {"models": "1000x64", "device": "cpu", "peers": None, "quick": True, "out": None}
    run.main(SimpleNamespace(**given, minutes=None, resume=False, averages="1"))
    printed = capsys.readouterr().out
    assert [printed.count(case) for case in ("fp32<-bf16", "bf16<-bf16 stochastic")] == [1, 1]
    assert "What the jobs should take" not in printed  # nothing else is measured
