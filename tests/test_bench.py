"""The benchmark measures what it says: shapes, bytes, a gate before the clock, an honest report."""

import io
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("tqdm")

from bench import __main__, cold, drift, gate, host, measure, peers, report, run, scaling, step
from bench.measure import Stopwatch, Subject
from bench.models import COUNTS, MODELS, SIZES, Model, make_module
from bench.peers import Built
from bench.results import AGAIN, LIMIT, NO_EMA, Results, Row, Spread
from tests.test_bench_capture import MACHINE

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TINY = Model("tiny", {"a.weight": (5, 3), "a.bias": (5,), "b.weight": (10_000,)})


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [
        ("resnet50", 161, 25_557_032),  # torchvision
        ("vit-l16", 296, 304_326_632),  # timm, torchvision
        ("gpt2-xl", 580, 1_557_611_200),  # transformers
        ("sdxl-unet", 1680, 2_567_463_684),  # diffusers
        ("llama-7b", 291, 6_738_415_616),  # transformers
        ("1000x64", 1000, 64_000),
    ],
)
def test_models_have_their_published_sizes(name: str, tensors: int, elements: int) -> None:
    assert len(MODELS[name].shapes) == tensors
    assert MODELS[name].elements == elements


def test_sweeps() -> None:
    assert [len(model.shapes) for model in COUNTS] == [1, 4, 16, 64, 256, 1024, 4096]
    assert {shape for model in COUNTS for shape in model.shapes.values()} == {(1024,)}
    assert [model.elements for model in SIZES] == [2**power for power in range(10, 32, 3)]
    assert {len(model.shapes) for model in SIZES} == {1}


def test_a_model_becomes_modules_with_random_parameters() -> None:
    module = make_module(TINY, torch.bfloat16, CPU)
    found = dict(module.named_parameters())
    assert {name: tuple(p.shape) for name, p in found.items()} == TINY.shapes
    assert all(p.dtype == torch.bfloat16 and p.count_nonzero() > 1 for p in found.values())
    assert [*dict(module.named_modules())] == ["", "a", "b"]


BYTES = {
    "fp32<-fp32": (4, 12),
    "fp32<-bf16": (4, 10),
    "bf16<-bf16": (2, 6),
    "bf16<-bf16 exact": (4, 10),
    "bf16<-bf16 stochastic": (2, 6),
}


def test_bytes_that_are_stored_and_that_must_move() -> None:
    assert {name: (case.stored, case.moved) for name, case in run.CASES.items()} == BYTES


def test_a_precision_that_only_ours_have_is_measured_for_ours() -> None:
    stopwatch = Stopwatch(CPU, 1000)
    keys = ["ours_foreach", "foreach_lerp"]
    for case in ("bf16<-bf16 exact", "bf16<-bf16 stochastic"):
        rows = [*run.measured(TINY, case, keys, stopwatch, 3, 60.0)]
        assert {row.peer for row in rows if row.times} == {LIMIT, AGAIN, "ema_triton (foreach)"}
        assert {row.bytes for row in rows} == {TINY.elements * BYTES[case][1]}
    assert [*run.measured(TINY, "bf16<-bf16 exact", ["foreach_lerp"], stopwatch, 3, 60.0)] == []


@pytest.mark.parametrize("size", [2, 7, 1000])
def test_the_limit_copies_as_many_bytes(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "COPY_BUFFER", 300)
    copied = []
    original = Tensor.copy_
    monkeypatch.setattr(
        Tensor, "copy_", lambda self, other: copied.append(self.nbytes) or original(self, other)
    )
    measure.copy_of(size, CPU)()
    assert 2 * sum(copied) == size // 2 * 2


@pytest.mark.filterwarnings("default")  # a peer's deprecations are its own affair
@pytest.mark.parametrize("key", peers.PEERS)
@pytest.mark.parametrize("schedule", run.SCHEDULES)
def test_peers_pass_the_gate(key: str, schedule: str) -> None:
    if key == "ours_triton":
        pytest.importorskip("triton")
    if key == "compiled_lerp" and shutil.which("g++") is None:
        pytest.skip("Inductor needs a C++ compiler")
    try:
        peer = peers.load(key)
    except ImportError as error:
        pytest.skip(f"absent: {error}")
    model = make_module(TINY, torch.float32, CPU)
    momenta = measure.momenta(schedule)
    with torch.no_grad():
        built = peer.build(model, 0.1, torch.float32)
        assert [tensor.shape for tensor in built.tensors] == [p.shape for p in model.parameters()]
        if key == "torch_swa_multi" and schedule == "changing":
            with pytest.raises(NotImplementedError, match="fixes the decay"):
                gate.fault(built, model, (next(momenta), next(momenta)))
        else:
            assert gate.fault(built, model, (next(momenta), next(momenta))) is None


def wrong(kind: str, online: list[Tensor], ema: list[Tensor]) -> Built:
    def update(momentum: float) -> None:
        if kind == "nothing":
            return
        if kind == "decay":
            momentum = 1 - momentum
        if kind == "a little":
            momentum *= 1.0001
        last = ema[-1][-1].clone()
        for old, new in zip(ema[kind == "skips one" :], online[kind == "skips one" :], strict=True):
            old.lerp_(new, momentum)
        if kind == "last element":
            ema[-1][-1] = last

    return Built(update, ema)


@pytest.mark.parametrize(
    "kind", ["nothing", "decay", "a little", "skips one", "last element", "nan", "right"]
)
def test_the_gate_catches_wrong_peers(kind: str) -> None:
    model = make_module(TINY, torch.float32, CPU)
    online = [parameter.detach() for parameter in model.parameters()]
    ema = [tensor.clone() for tensor in online]
    if kind == "nan":
        ema[0][0] = torch.nan
    fault = gate.fault(wrong(kind, online, ema), model, (0.1, 0.2))
    assert (fault is None) == (kind == "right")
    if kind == "last element":
        assert fault.startswith("tensor 2 of 3 is off by")
        assert fault.endswith("after an update with momentum 0.1")


def fake_peer(update, name: str = "fake") -> SimpleNamespace:
    def build(model: nn.Module, momentum: float, ema_dtype: torch.dtype) -> Built:
        built = peers.load("foreach_lerp").build(model, momentum, ema_dtype)
        return Built(update or built.update, built.tensors)

    return SimpleNamespace(NAME=name, build=build)


def raises(momentum: float) -> None:
    raise RuntimeError("refused\nmore")


def measured(monkeypatch: pytest.MonkeyPatch, fakes: dict) -> list[Row]:
    load = peers.load

    def loaded(key: str):
        if key not in fakes:
            return load(key)
        if isinstance(fakes[key], Exception):
            raise fakes[key]
        return fakes[key]

    monkeypatch.setattr(peers, "load", loaded)
    keys = ["foreach_lerp", *fakes]
    return [*run.measured(TINY, "fp32<-fp32", keys, Stopwatch(CPU, 1000), 3, 60.0)]


def test_only_right_peers_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = {
        "absent": ImportError("no such package"),
        "wrong": fake_peer(lambda momentum: None, "wrong"),
        "raising": fake_peer(raises, "raising"),
    }
    rows = {(row.peer, row.schedule): row for row in measured(monkeypatch, fakes)}
    status = {key: row.status for key, row in rows.items()}
    assert status == {
        (LIMIT, "constant"): "timed",
        ("torch._foreach_lerp_", "constant"): "timed",
        (AGAIN, "constant"): "timed",
        ("torch._foreach_lerp_", "changing"): "timed",
        ("absent", "constant"): "absent",
        ("wrong", "constant"): "wrong",
        ("wrong", "changing"): "wrong",
        ("raising", "constant"): "error",
    }
    for row in rows.values():
        assert bool(row.times) == (row.status == "timed")
        assert (row.tensors, row.elements, row.bytes) == (3, 10_020, 120_240)
        for spread in row.times.values():
            assert spread.count == 3
            assert 0 < spread.low <= spread.median <= spread.high
    assert rows["absent", "constant"].reason == "ImportError: no such package"
    assert rows["raising", "constant"].reason == "RuntimeError: refused"
    assert "is off by" in rows["wrong", "constant"].reason


def test_mixed_dtypes_are_reported_as_the_peers_error() -> None:
    stopwatch = Stopwatch(CPU, 1000)
    rows = [*run.measured(TINY, "fp32<-bf16", ["foreach_lerp", "foreach_cast"], stopwatch, 3, 60.0)]
    status = {row.peer: row.status for row in rows}
    assert status["torch._foreach_lerp_"] == "error"
    assert status["cast, torch._foreach_lerp_"] == "timed"


def test_subjects_take_turns() -> None:
    seen: list[str] = []
    subjects = {name: Subject(lambda: None) for name in "abc"}
    names = {id(subject): name for name, subject in subjects.items()}

    def sample(subject: Subject) -> dict[str, float]:
        seen.append(names[id(subject)])
        return {"wall": float(len(seen))}

    found = measure.interleaved(subjects, sample, rounds=4, seconds=60.0)
    assert "".join(seen) == "abcbcacababc"
    assert found["a"]["wall"] == [1.0, 6.0, 8.0, 10.0]
    seen.clear()
    measure.interleaved(subjects, sample, rounds=100, seconds=0.0)
    assert len(seen) == 7 * 3


def test_caches_are_flushed_before_an_update() -> None:
    stopwatch = Stopwatch(CPU, 1000)
    assert stopwatch._junk.nbytes == 2000
    written = []
    times = [
        stopwatch.sample(Subject(lambda: written.append(stopwatch._junk[0].item())))
        for _ in range(2)
    ]
    first, second = (written.index(round) for round in (1, 2))
    assert first == 0  # before the first update, and not again before the repeated ones
    assert written == [1] * second + [2] * (len(written) - second)
    assert all({*found} == {"wall", "repeated"} for found in times)


def test_a_wrong_peer_trains_no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    load, fake = peers.load, fake_peer(lambda momentum: None, "wrong")
    monkeypatch.setattr(peers, "load", lambda key: fake if key == "wrong" else load(key))
    found, update = step._built("cnn", 1, "wrong", make_module(TINY, torch.float32, CPU))
    assert update is None
    assert (found.peer, found.status, found.step) == ("wrong", "wrong", None)


def test_momenta() -> None:
    constant, changing = (measure.momenta(schedule) for schedule in run.SCHEDULES)
    assert {next(constant) for _ in range(100)} == {0.1}
    values = [next(changing) for _ in range(100)]
    assert len(set(values)) == 100
    assert all(0.1 < value <= 0.2 for value in values)


def test_spread() -> None:
    assert Spread.of([3.0]) == Spread(1, 3.0, 3.0, 3.0)
    assert Spread.of([float(value) for value in range(11)]) == Spread(11, 1.0, 5.0, 9.0)


def test_drift(tmp_path: Path) -> None:
    page = tmp_path / "precision.md"
    page.write_text(f"before\n{drift.BEGIN}\nold\n{drift.END}\nafter\n")
    drift.main(SimpleNamespace(updates=200, out=tmp_path, page=page))
    points = drift.load(tmp_path / "drift.csv")
    last = {(p.dtype, p.precision): p for p in points if p.update == 200}
    assert {*last} == {
        (dtype, precision)
        for dtype in ("bf16", "fp16")
        for precision in ("float64", "accumulated", "exact", "stochastic", "nearest")
    }
    for dtype in ("bf16", "fp16"):
        assert last[dtype, "float64"].rms == 0
        assert 0 < last[dtype, "accumulated"].rms < 1e-3
        assert last[dtype, "nearest"].moved == 0  # it stands still
        # 200 steps of 1e-4 are less than a spacing, which the weights show rounded.
        assert last[dtype, "exact"].rms <= 0.5
    assert (tmp_path / "drift.png").stat().st_size > 5000
    assert '| `"exact"` | 4 / 6 | 10 / 14 |' in page.read_text()


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    __main__.main()


def test_the_command_measures_and_writes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.json"
    monkeypatch.setattr(run, "describe", lambda device: MACHINE)
    monkeypatch.setattr(run, "QUICK_ROUNDS", 1)
    arguments = ["--quick", "--device=cpu", "--models=1x1Ki", "--peers=ours_foreach,foreach_lerp"]
    command(monkeypatch, "run", *arguments, f"--out={out}")
    printed = capsys.readouterr()
    assert printed.out.startswith("What the jobs should take, of ")
    assert "| ema_triton (foreach) |" in printed.out
    assert re.search(r"^1x1Ki fp32<-fp32: [\d.]+ s; jobs left: 4$", printed.err, re.MULTILINE)
    rows = Results.load(out).rows
    assert {r.case for r in rows if r.times} == {*run.CASES}
    assert {r.peer for r in rows if r.times} >= {LIMIT, "ema_triton (foreach)"}


def test_tables_are_printed_without_matplotlib_and_tqdm() -> None:
    program = (
        "import sys; sys.modules['matplotlib'] = sys.modules['tqdm'] = None;"
        "import bench.around, bench.run, bench.step; print('fine')"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout == "fine\n", ran.stderr


def test_what_is_printed_into_a_pipe_is_not_kept_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(sys, "stdout", pipe)
    monkeypatch.setattr(scaling, "main", lambda args: sys.stdout.write("a line\n"))
    command(monkeypatch, "scaling")
    assert pipe.buffer.getvalue() == b"a line\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--models=resnet51"], "unknown: resnet51. Known are: resnet50, vit-l16"),
        (["run", "--peers=nobody"], "unknown: nobody. Known are: ours_triton"),
        (["walk"], "invalid choice: 'walk'"),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as failed:
        command(monkeypatch, *arguments)
    assert message in f"{failed.value}{capsys.readouterr().err}"


@pytest.mark.parametrize("name", [*step.MODELS])
def test_a_training_step_trains(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(step.BATCH, "cpu", 2)
    model = step.MODELS[name]()
    parameter = next(model.parameters())
    before = parameter.detach().clone()
    step.training_step(model, CPU)()
    assert not torch.equal(parameter, before)


def test_training_steps_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(step.BATCH, "cpu", 1)
    monkeypatch.setitem(step.STEPS, "cpu", 1)
    monkeypatch.setattr(measure, "WARM_UP", 0)
    rows = {row.peer: row for row in step.measured("cnn", ["ours_foreach", "ignite"], CPU, 2)}
    assert [*rows] == [NO_EMA, AGAIN, "ema_triton (foreach)", "Ignite EMAHandler"]
    assert all(row.status == "timed" and row.step.count == 2 for row in rows.values())
    assert rows[NO_EMA].added.median == 0
    text = report.table(Results("step", MACHINE, "c", "d", [*rows.values()]))
    assert "| without EMA | step: " in text
    assert "| Ignite EMAHandler | " in text


@pytest.mark.gpu
def test_figures_of_a_gpu() -> None:
    device = torch.device("cuda")
    keys = ["torch_swa_multi", "ours_triton", "foreach_lerp", "foreach_mul_add", "ema_pytorch"]
    rows = [*run.measured(TINY, "fp32<-fp32", keys, Stopwatch(device, 1 << 20), 3, 60.0)]
    found = {row.peer: row for row in rows if row.schedule == "constant"}
    ours = found["ema_triton (triton)"]
    assert ours.launches == 1
    assert ours.extra_memory == 0
    assert {*ours.times} == {"device", "host", "graph"}
    assert found["foreach mul, add"].launches == 2
    assert {*found[LIMIT].times} == {"device", "host", "graph"}
    waits = found["AveragedModel (multi_avg_fn)"]
    assert waits.reason == "no CUDA graph: it waits for the device"
    assert {*waits.times} == {"device", "host"}
    changing = next(row for row in rows if row.peer == ours.peer and row.schedule == "changing")
    assert {*changing.times} == {"device", "host"}


def test_the_table_of_scaling_is_the_documents() -> None:
    document = Path(__file__).parent.parent / "docs" / "many-gpus.md"
    assert scaling.table(4.3e12, 0.5e-6) in document.read_text()


def test_scaling_counts_the_parameters_of_the_models_it_names() -> None:
    counted = {
        model.name: sum(math.prod(shape) for shape in model.shapes()) / 1e9
        for model in scaling.MODELS
    }
    assert counted == {
        "7 B": pytest.approx(6.74, abs=0.005),
        "70 B": pytest.approx(70.55, abs=0.005),
        "405 B": pytest.approx(405.85, abs=0.005),
    }


def test_scaling_counts_what_the_fullest_rank_has() -> None:
    assert scaling.on_the_fullest_rank([(8, 3), (9, 2), (1,)], 4) == 2 * 3 + 3 * 2 + 1
    assert scaling.on_the_fullest_rank([(8, 3), (9, 2), (1,)], 1) == 24 + 18 + 1


def test_the_host_time_is_shown_in_parts() -> None:
    model = host.shrunk(MODELS["resnet50"])
    assert len(model.shapes) == 161
    assert [len(shape) for shape in model.shapes.values()] == [
        len(shape) for shape in MODELS["resnet50"].shapes.values()
    ]
    assert model.elements <= 161 * 2**4
    found = host.measured(host.shrunk(TINY), CPU, calls=3)
    total, *parts = (value for name, value in found.items() if name[0] in " u")
    assert sum(parts) == pytest.approx(total)
    assert {"torch._foreach_lerp_", "EMABank of 3", "3 ModelEMA one by one"} <= found.keys()


def test_the_median_is_of_the_calls_alone() -> None:
    calls = []
    assert host.median(lambda: calls.append(1), CPU, 5) > 0
    assert len(calls) == 15


def test_the_first_update_is_timed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = cold.measured("cpu", "bfloat16", repeats=1)
    assert len(found) == 2
    for backend, times in found.values():
        assert backend == "foreach"
        assert [*times][2:] == ["build the EMA", "first update", "second update"]
        assert min(times.values()) > 0
    monkeypatch.setattr(cold, "PROGRAM", "raise ValueError('no compiler')")
    with pytest.raises(SystemExit, match=r"measured failed:[\s\S]*no compiler"):
        cold.measured("cpu", "bfloat16", repeats=1)


def test_host_and_cold_print_their_tables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MODELS, "tiny", TINY)
    monkeypatch.setattr(host, "CALLS", 3)
    host.main(SimpleNamespace(models="tiny", device="cpu"))
    printed = capsys.readouterr().out
    assert "\ntiny, 3 tensors\n" in printed
    assert re.search(r"^ +[\d.]+    averaging \(foreach\)$", printed, re.MULTILINE)
    parts = ("foreach", {"build the EMA": 12.34})
    monkeypatch.setattr(cold, "measured", lambda *_: {"Triton's cache empty": parts})
    cold.main(SimpleNamespace(device="cpu"))
    printed = capsys.readouterr().out
    assert (
        "\nbfloat16, backend foreach, Triton's cache empty\n     12.3  build the EMA\n" in printed
    )
