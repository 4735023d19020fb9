"""The sweep tries what it says: each variant computes what ships, by other code."""

import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("tqdm")

from bench import tune
from bench.measure import Stopwatch
from bench.models import MODELS, Model, make_module
from bench.results import LIMIT
from bench.run import Case
from ema_triton import ModelEMA
from ema_triton.buckets import Bucket
from tests.test_generated_code import python

# Several chunks, whole blocks, a ragged end, a masked tensor, an empty one.
RAGGED = Model(
    "ragged", {"a": (2, 8192), "b": (8200,), "c": (101,), "d": (1,), "e": (0, 3), "f": (64, 64)}
)


def bucket_of(case: Case, device: torch.device) -> Bucket:
    online = make_module(RAGGED, case.online_dtype, device)
    ema = ModelEMA(online, backend="triton", ema_dtype=case.ema_dtype, precision=case.precision)
    (bucket,) = ema._plan.buckets
    return bucket


@pytest.mark.parametrize("case", tune.CASES.values(), ids=tune.CASES)
def test_every_variant_computes_what_ships(case: Case, kernel_device: torch.device) -> None:
    bucket = bucket_of(case, kernel_device)
    tune.check(bucket, [tune.prepared(bucket, variant) for variant in tune.variants(case)])


def test_every_variant_is_timed(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = tune.CASES["fp32<-bf16"]
    some = tune.variants(case)[:2] + tune.variants(case)[-1:]
    monkeypatch.setattr(tune, "variants", lambda _: some)
    online = make_module(RAGGED, case.online_dtype, kernel_device)
    monkeypatch.setattr(tune, "ROUNDS", 1)
    found = tune.measured(online, case, Stopwatch(kernel_device, 1000))
    assert {*found} == {LIMIT, tune.SHIPPED, *map(str, some)}
    lines = tune.table(found, tune.shipped(case))
    assert len(lines) == 5
    assert sum("<- ships" in line for line in lines) == 1


def test_the_tables_are_printed_and_written(
    kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(MODELS, "ragged", RAGGED)
    monkeypatch.setattr(tune, "ROUNDS", 1)
    monkeypatch.setattr(tune, "variants", lambda case: [tune.shipped(case)])
    out = tmp_path / "tune.txt"
    cases = "fp32<-fp32,bf16<-bf16"
    tune.main(SimpleNamespace(models="ragged", cases=cases, device=kernel_device.type, out=out))
    written = out.read_text()
    assert written in capsys.readouterr().out
    for case in cases.split(","):
        assert f"\nragged {case}\n" in written
    assert written.count("of the copy  chunk  8192 block 2048 warps 4") == 2
    assert written.count("<- ships") == 2


def test_a_variant_that_differs_is_not_timed(kernel_device: torch.device) -> None:
    bucket = bucket_of(tune.CASES["fp32<-fp32"], kernel_device)
    right = tune.prepared(bucket, tune.shipped(tune.CASES["fp32<-fp32"]))
    tune.check(bucket, [right])
    for wrong in (lambda: None, lambda: (right(), right())):
        with pytest.raises(AssertionError, match="differs from the shipped kernel"):
            tune.check(bucket, [right, wrong])


def test_the_sweep_has_what_was_asked_for() -> None:
    for case in tune.CASES.values():
        tried = tune.variants(case)
        assert tried[0] == tune.shipped(case)
        assert {v.chunk for v in tried} >= {*tune.CHUNKS}
        assert {v.block for v in tried} >= {*tune.BLOCKS}
        assert {v.warps for v in tried} >= {*tune.WARPS}
        assert {v.programs for v in tried} == {None, *tune.PROGRAMS}
        assert {(v.online_hint, v.ema_hint) for v in tried} == {("", ""), *tune.HINTS}
        assert {v.width for v in tried} == ({0, 4} if case.online_dtype.itemsize < 4 else {0})
        assert len(set(map(str, tried))) == len(tried)


def test_variants_are_other_code() -> None:
    """Compiled for sm_90: hints, widths and the persistent loop show in the PTX."""
    program = textwrap.dedent("""
        import re
        import triton.language as tl
        from bench.candidates import candidate
        from bench.ptx import _compile

        def ptx(ema, online, **choices):
            arguments = {
                "table_ptr": "*i64", "ema_ptr": f"*{ema}", "companion_ptr": None,
                "rows": "i32", "momentum": "fp64",
            }
            dtype = {"fp32": tl.float32, "bf16": tl.bfloat16}[online]
            constants = {
                "ONLINE": dtype, "PERSISTENT": False, "WIDTH": 0, "ONLINE_HINT": "",
                "EMA_HINT": "", "BLOCK": 2048, **choices,
            }
            return _compile("sm_90", candidate, arguments, constants).asm["ptx"]

        def loads(text):
            return {*re.findall(r"ld\\.global\\S*?(\\.v\\d\\.b\\d+)", text)}

        plain = ptx("fp32", "fp32")
        assert "evict_first" not in plain
        hinted = ptx("fp32", "fp32", ONLINE_HINT="evict_first")
        both = ptx("fp32", "fp32", ONLINE_HINT="evict_first", EMA_HINT="evict_first")
        assert 0 < hinted.count("evict_first") < both.count("evict_first")
        assert loads(ptx("fp32", "bf16", WIDTH=4)) == {".v2.b32", ".v4.b32"}
        assert loads(ptx("fp32", "bf16")) == {".v4.b32"}
        assert loads(ptx("bf16", "bf16", WIDTH=4)) == {".v2.b32"}
        assert loads(ptx("bf16", "bf16")) == {".v4.b32"}
        assert "%nctaid.x" in ptx("fp32", "fp32", PERSISTENT=True)
        assert "%nctaid.x" not in plain
        print("fine")
    """)
    ran = python("-c", program)
    assert ran.stdout == "fine\n", ran.stderr


def test_the_command_line() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "bench", "tune", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--cases" in ran.stdout
