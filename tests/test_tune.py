"""The sweep tries what it says: each variant computes what ships, by other code."""

import sys
import textwrap
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
pytest.importorskip("tqdm")

from bench import __main__, jobs, measure, tune
from bench.cases import Case
from bench.measure import Stopwatch
from bench.models import MODELS, Model, make_module
from bench.results import LIMIT
from ema_triton import ModelEMA
from ema_triton.plan import Launch
from ema_triton.state import CHUNK
from tests.ops.test_generated_code import python

# Several chunks, whole blocks, a ragged end, a masked tensor, an empty one.
RAGGED = Model(
    "ragged", {"a": (2, 8192), "b": (8200,), "c": (101,), "d": (1,), "e": (0, 3), "f": (64, 64)}
)


@pytest.fixture(autouse=True)
def _candidates(monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device) -> None:
    """Where there is no GPU, the candidates are executed on the CPU too."""
    if kernel_device.type != "cpu":
        return
    from tests.ptx.run import Kernel, spans_of

    kernel, launched = Kernel(tune.candidate), tune._launch

    def launched_here(one: Launch, variant: tune.Variant, table: Tensor) -> None:
        kernel.everyone = [*chain.from_iterable(spans_of(one, len(one.bucket.flat)))]
        launched(one, variant, table)

    monkeypatch.setattr(tune, "candidate", kernel)
    monkeypatch.setattr(tune, "_launch", launched_here)


def launch_of(case: Case, device: torch.device) -> Launch:
    online = make_module(RAGGED, case.online_dtype, device)
    ema = ModelEMA(online, backend="triton", ema_dtype=case.ema_dtype, precision=case.precision)
    (one,) = ema._planner.plan.launches
    return one


WHOLE = 1 << 40


@pytest.mark.parametrize("case", tune.CASES.values(), ids=tune.CASES)
def test_every_variant_computes_what_ships(case: Case, kernel_device: torch.device) -> None:
    tried = tune.variants(case)
    if kernel_device.type == "cpu":  # where nothing depends on the number of warps
        tried = [variant for variant in tried if variant.warps == tried[0].warps]
    one = launch_of(case, kernel_device)
    tune.check(one, [*tune.prepare(one, tried).values()], WHOLE)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One update of each variant is timed."""
    monkeypatch.setattr(tune, "ROUNDS", 1)
    monkeypatch.setattr(measure, "WARM_UP", 0)
    monkeypatch.setattr(measure, "REPEATS", 1)


def test_every_variant_is_timed(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    case = tune.CASES["fp32<-bf16"]
    some = tune.variants(case)[:2] + tune.variants(case)[-1:]
    monkeypatch.setattr(tune, "variants", lambda _: some)
    online = make_module(RAGGED, case.online_dtype, kernel_device)
    found = tune.measured(online, case, Stopwatch(kernel_device, 1000), WHOLE)
    assert {*found} == {LIMIT, tune.SHIPPED, *map(str, some)}
    lines = tune.table(found, tune.shipped(case))
    assert len(lines) == 5
    assert sum("<- ships" in line for line in lines) == 1


SMALL = Model("small", {"a": (8200,), "b": (5,)})


def arguments(out: Path, *, resume: bool = False) -> SimpleNamespace:
    cases = "fp32<-fp32,bf16<-bf16"
    return SimpleNamespace(models="small", cases=cases, device="cpu", out=out, resume=resume)


def test_the_tables_are_printed_and_written(
    kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    quick: None,
) -> None:
    monkeypatch.setitem(MODELS, "small", SMALL)
    monkeypatch.setattr(tune, "variants", lambda case: [tune.shipped(case)])
    given = arguments(tmp_path / "new" / "tune.txt")
    given.device = kernel_device.type
    tune.main(given)
    written = given.out.read_text()
    assert written == capsys.readouterr().out
    for case in given.cases.split(","):
        assert f"\nsmall {case}\n" in written
    assert written.count("of the copy  chunk  4096 block 2048 warps 4") == 2
    assert written.count("<- ships") == 2


def test_a_cut_off_loses_no_case_and_is_gone_on_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(MODELS, "small", SMALL)
    cases = []

    def cut_off(model: Model, case: Case, stopwatch: Stopwatch) -> list[str]:
        cases.append(case)
        if len(cases) == 2:
            raise KeyboardInterrupt
        return [f"row {len(cases)}"]

    monkeypatch.setattr(tune, "rows", cut_off)
    out = tmp_path / "tune.txt"
    with pytest.raises(KeyboardInterrupt):
        tune.main(arguments(out))
    head, *rest = out.read_text().splitlines()
    assert rest == ["", "small fp32<-fp32", "row 1"]
    tune.main(arguments(out, resume=True))
    again = ["", "small bf16<-bf16", "row 3"]
    assert out.read_text().splitlines() == [head, *rest, *again]
    out.write_text(out.read_text().replace("triton", "another triton"))
    with pytest.raises(SystemExit, match=r"--resume: .* is of .*another triton"):
        tune.main(arguments(out, resume=True))


def test_what_does_not_fit_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    case, stopwatch = tune.CASES["fp32<-fp32"], Stopwatch(torch.device("cpu"), 1000)
    asked = []

    def measured(online: object, case: Case, stopwatch: Stopwatch, piece: int) -> dict:
        asked.append(piece)
        raise RuntimeError("stop")

    monkeypatch.setattr(tune, "measured", measured)
    elements = 10 * tune.LEAST_PIECE
    model = Model("model", {"w": (elements,)})
    monkeypatch.setattr(measure, "COPY_BUFFER", 1000)

    def rows(size: int) -> list[str]:
        return [*tune.rows(model, case, stopwatch, int(size / jobs.CPU_SHARE) + 1)]

    # The model and its EMA, 8 bytes per element; 9 more for those that are compared at a time.
    least = 8 * elements + 9 * tune.LEAST_PIECE
    assert rows(least) == ["failed: RuntimeError: stop"]
    assert asked == [tune.LEAST_PIECE]
    (reason,) = rows(least - 9)
    assert reason == "skipped: it needs 0.0 GiB, of 0.0 GiB that are free"
    assert len(asked) == 1
    rows(40 * elements)
    assert asked[1] > elements  # at once


def test_seven_billion_parameters_are_compared_on_78_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    pieces = []
    monkeypatch.setattr(tune, "measured", lambda *rest: pieces.append(rest[-1]) or {})
    monkeypatch.setattr(tune, "table", lambda *rest: [])
    monkeypatch.setattr(tune, "make_module", lambda *rest: None)
    stopwatch = SimpleNamespace(device=device)
    for case in tune.CASES.values():
        assert [*tune.rows(MODELS["llama-7b"], case, stopwatch, 78 << 30)] == []
    assert len(pieces) == len(tune.CASES)
    # Whole copies of bf16 alone: of the others some 100 and 88 GiB would be needed.
    assert [piece >= MODELS["llama-7b"].elements for piece in pieces] == [
        name == "bf16<-bf16" for name in tune.CASES
    ]


def test_a_variant_that_differs_is_not_timed(kernel_device: torch.device) -> None:
    case = tune.CASES["fp32<-fp32"]
    one = launch_of(case, kernel_device)
    (right,) = tune.prepare(one, [tune.shipped(case)]).values()
    tune.check(one, [right], WHOLE)
    twice = right._replace(launch=lambda rows: (right.launch(rows), right.launch(rows)))
    for wrong in (right._replace(launch=lambda rows: None), twice):
        with pytest.raises(AssertionError, match="differs from the shipped kernel in elements 0 "):
            tune.check(one, [right, wrong], WHOLE)


LONG = Model("long", {"a": (3 * tune.LEAST_PIECE + 5,), "b": (tune.LEAST_PIECE,), "c": (7,)})


def test_pieces_are_compared_where_whole_copies_do_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With what stands in for the kernel: it is called with the rows of each piece, once."""
    online = make_module(LONG, torch.float32, torch.device("cpu"))
    ema = ModelEMA(online, backend="foreach")
    (one,) = ema._planner.plan.launches
    rows = []

    def launch(changed: Launch, momentum: float, chunks: int) -> None:
        rows.extend(changed.chunk_table.tolist())
        assert chunks == len(changed.chunk_table)
        for _, offset, length, _ in changed.chunk_table.tolist():
            one.bucket.flat[offset : offset + length // 2].mul_(1 - momentum)

    monkeypatch.setattr(tune.triton_backend, "_launch", launch)
    table = one.table(4096)
    compared = []

    def variant(own: torch.Tensor, wrong: int | None = None) -> None:
        compared.append(own[:, 1].tolist())
        for _, offset, length, _ in own.tolist():
            if offset != wrong:
                one.bucket.flat[offset : offset + length // 2].mul_(1 - tune.MOMENTUM)

    tune.check(one, [tune.Prepared(table, variant)], 2 * tune.LEAST_PIECE)
    assert rows == one.chunk_table.tolist()
    assert [len(offsets) for offsets in compared] == [9, 16, 9]
    assert sum(compared, []) == table[:, 1].tolist()  # noqa: RUF017
    # What is wrong in the last chunk alone is found, and said where.
    last = int(table[-1, 1])
    wrong = tune.Prepared(table, lambda own: variant(own, last))
    with pytest.raises(AssertionError, match=f"elements [0-9]+ to {len(one.bucket.flat)} of "):
        tune.check(one, [wrong], 2 * tune.LEAST_PIECE)


def test_a_piece_has_whole_chunks_of_every_size() -> None:
    assert all(tune.LEAST_PIECE % chunk == 0 for chunk in (*tune.CHUNKS, CHUNK))
    assert [*tune.pieces([0, 4, 8, 10, 14], 8)] == [(0, 8), (8, 14)]
    assert [*tune.pieces([0, 4, 8, 10, 14], 1)] == [(0, 4), (4, 8), (8, 10), (10, 14)]
    assert [*tune.pieces([0, 4, 8, 10, 14], WHOLE)] == [(0, 14)]


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
                "table_ptr": "*i64", "ema_ptr": f"*{ema}", "residual_ptr": None,
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


def test_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "tune", "--help"])
    with pytest.raises(SystemExit):
        __main__.main()
    assert "--cases" in capsys.readouterr().out
