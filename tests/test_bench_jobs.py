"""What `bench run` plans: memory, order, minutes; and that nothing is lost when it is cut off."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import jobs, machine, measure, peers, run, step
from bench.measure import Stopwatch
from bench.models import MODELS, Model, make_module
from bench.results import LIMIT, NO_EMA, Results, Row, Spread, StepRow
from ema_triton import state
from ema_triton.ops import foreach_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TINY = Model("tiny", {"a.weight": (5, 3), "a.bias": (5,), "b.weight": (10_000,)})
EVEN = Model("even", {f"{index}.weight": (128, 128) for index in range(12)})
GB = 10**9


class Alive(TorchDispatchMode):
    """Bytes of the tensors that torch has made in this mode and that are still there.

    Storages may have memory in common.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._found: dict[int, tuple[StorageWeakRef, int, int]] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    begin = storage.data_ptr()
                    span = begin, begin + storage.nbytes()
                    self._found[storage._cdata] = StorageWeakRef(storage), *span
        self._found = {key: one for key, one in self._found.items() if not one[0].expired()}
        self.now = last = 0
        for begin, end in sorted((begin, end) for _, begin, end in self._found.values()):
            self.now += max(0, end - max(begin, last))
            last = max(last, end)
        self.peak = max(self.peak, self.now)
        return result


# Inductor's code makes its tensors without the dispatcher; timm is absent in most environments.
WATCHED = [key for key in peers.PEERS if key not in ("compiled_lerp", "timm", "ours_triton")]


@pytest.mark.filterwarnings("default")  # a peer's deprecations are its own affair
@pytest.mark.parametrize("case", run.CASES)
def test_peers_take_the_memory_that_they_say(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as they run: those that refuse the dtypes take nothing."""
    for module in (state, foreach_backend):
        monkeypatch.setattr(module, "SCRATCH", 1024)  # in proportion to the model
    online_dtype, ema_dtype = run.CASES[case].online_dtype, run.CASES[case].ema_dtype
    total = jobs.sizes(EVEN, run.CASES[case])
    # Tables and scratch; and the casts of one tensor that torch makes within an operation.
    slack = total.online // 20 + total.largest * total.ema_width
    seen = []
    for key in run._measured_keys(case, WATCHED):
        if not jobs.is_present(key):
            continue
        online = make_module(EVEN, online_dtype, CPU)
        alive = Alive([*online.parameters()])
        precision = {"precision": run.CASES[case].precision} if key in peers.OURS else {}
        with torch.no_grad(), alive:
            built = peers.load(key).build(online, 0.1, ema_dtype, **precision)
            building = alive.peak
            try:
                built.update(0.1)
            except RuntimeError:
                continue
            alive.peak = 0
            built.update(0.1)
            torch.zeros(())  # what was freed since the last operation
        said = peers.memory(peers.load(key), total)
        assert abs(alive.now - total.ema) <= slack, key
        assert abs(building - said.building) <= slack, key
        assert abs(alive.peak - alive.now - said.updating) <= slack, key
        seen.append(key)
    assert "ours_foreach" in seen
    if case == "fp32<-fp32":
        assert len(seen) >= 5
        assert total.online > 4 * slack  # the control: what is let pass is no copy of the model


def test_a_peer_that_says_nothing_is_taken_for_a_copy_of_everything() -> None:
    total = jobs.sizes(TINY, run.CASES["fp32<-bf16"])
    assert peers.memory(SimpleNamespace(), total) == (6 * 10_020, 4 * 10_020)


def fake(monkeypatch: pytest.MonkeyPatch, **memory: tuple[int, int]) -> None:
    """Peers that take these bytes per parameter while building and updating."""

    def load(key: str) -> SimpleNamespace:
        if key not in memory:
            raise ImportError(key)
        building, updating = memory[key]
        return SimpleNamespace(
            NAME=key.upper(),
            memory=lambda sizes: peers.Memory(
                building * sizes.online // 4, updating * sizes.online // 4
            ),
        )

    monkeypatch.setattr(peers, "load", load)


def test_memory_decides_how_many_are_timed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, a=(4, 0), b=(4, 0), c=(8, 0), d=(4, 4), e=(4, 0))
    model, case = Model("billion", {"w": (10**9,)}), run.CASES["fp32<-fp32"]
    copy = jobs.copies(model, case)
    assert copy == 2 * 2**30

    def groups(memory: int, device: torch.device = CUDA) -> list[str]:
        keys = [*"abcde", "absent"]
        found = jobs.fitted(model, case, keys, memory + jobs.RESERVE, device)
        assert found.peak <= memory
        groups = ["".join(key for key in group if len(key) == 1) for group in found.groups]
        return [*groups, *found.too_large]

    # 4 GB for the online model, 4 per EMA; d has 4 more in its graph, and 4 in an update.
    assert groups(32 * GB + copy) == ["abcde"]
    assert groups(32 * GB + copy - 1) == ["abcd", "e"]
    # a and b, 8 for building c; and c with a copy that is made later, where 4 of them are free.
    assert groups(20 * GB) == ["abc", "d", "e"]
    assert groups(20 * GB - 1) == ["ab", "c", "d", "e"]
    assert groups(12 * GB - 1) == ["a", "b", "e", "c", "d"]
    assert groups(4 * GB) == [*"abcde", "absent"]
    # On a CPU no graph keeps anything.
    share = int((28 * GB + copy) / jobs.CPU_SHARE) + 1
    found = jobs.fitted(model, case, [*"abcde"], share, CPU)
    assert found.groups == [[*"abcde"]]


def test_seven_billion_parameters_on_78_gib() -> None:
    for case in ("fp32<-fp32", "bf16<-bf16 exact"):
        keys = run._measured_keys(case, ["ours_foreach", "foreach_lerp", "torch_swa_plain"])
        found = jobs.fitted(MODELS["llama-7b"], run.CASES[case], keys, 78 << 30, CUDA)
        assert found.too_large == {}
    # Ours take no more while they are built than is kept: 38 GiB with an exact one, 50 of fp32.
    for case, kept in (("fp32<-fp32", 50.2), ("bf16<-bf16 exact", 37.7)):
        total = jobs.sizes(MODELS["llama-7b"], run.CASES[case])
        ours = peers.memory(peers.load("ours_foreach"), total)
        assert total.online + ours.building == total.online + total.ema
        assert (total.online + total.ema) / 2**30 == pytest.approx(kept, abs=0.1)


def measured(memory: int, keys: list[str]) -> list[Row]:
    stopwatch = Stopwatch(CPU, 1000)
    return [*run.measured(TINY, "fp32<-fp32", keys, stopwatch, 1, 0.0, memory)]


def test_what_does_not_fit_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = measured(100_000, ["foreach_lerp"])
    assert (row.peer, row.status) == ("torch._foreach_lerp_", "skipped")
    assert row.reason == "tiny needs 0.0 GiB, of 0.0 GiB that are free"
    monkeypatch.setattr(jobs, "gib", str)
    # Twice the model and the copy's buffers fit, a third one does not.
    monkeypatch.setattr(measure, "COPY_BUFFER", 10_000)
    enough = int((2.5 * 40_080 + 20_000) / jobs.CPU_SHARE)
    rows = {row.peer: row.status for row in measured(enough, ["foreach_lerp", "diffusers"])}
    assert rows["torch._foreach_lerp_"] == "timed"
    assert rows["diffusers EMAModel (foreach)"] == "skipped"


def test_a_group_that_fails_costs_no_other_one_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    enough = int((2.5 * 40_080 + 20_000) / jobs.CPU_SHARE)
    monkeypatch.setattr(measure, "COPY_BUFFER", 10_000)
    timed, calls = measure.interleaved, []

    def fails_once(*arguments: object) -> dict:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        return timed(*arguments)

    monkeypatch.setattr(measure, "interleaved", fails_once)
    rows = measured(enough, ["foreach_lerp", "foreach_mul_add"])
    assert len(calls) == 2
    assert [row.reason for row in rows if row.status == "error"] == [
        "OutOfMemoryError: CUDA out of memory. Tried"
    ]
    assert {row.peer for row in rows if row.times} >= {LIMIT, "foreach mul, add"}


def test_a_peer_whose_import_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(key: str) -> None:
        raise {"absent": ImportError, "broken": RuntimeError}[key]("no")

    monkeypatch.setattr(peers, "load", load)
    rows = measured(10**9, ["absent", "broken"])
    assert [(row.peer, row.status, row.reason) for row in rows if row.peer != LIMIT] == [
        ("absent", "absent", "ImportError: no"),
        ("broken", "error", "RuntimeError: no"),
    ]


def test_the_most_telling_jobs_come_first() -> None:
    names = ["resnet50", "1000x64", "4x1Ki", "1x2^10", "llama-7b"]
    todo = [(MODELS[name], case) for name in names for case in run.CASES]
    order = [(model.name, case) for model, case in jobs.in_order(todo)]
    assert len(order) == 25
    assert order[:7] == [
        ("resnet50", "fp32<-fp32"),
        ("1000x64", "fp32<-fp32"),
        ("llama-7b", "fp32<-fp32"),
        ("resnet50", "bf16<-bf16 exact"),
        ("1000x64", "bf16<-bf16 exact"),
        ("llama-7b", "bf16<-bf16 exact"),
        ("4x1Ki", "fp32<-fp32"),
    ]
    assert order[-1] == ("1x2^10", "bf16<-bf16 stochastic")
    assert {*jobs.TELLING} == {*run.CASES}


def test_larger_jobs_are_expected_to_take_longer() -> None:
    now = jobs.Pace(flush=1e-4, byte=1e-12, call=1e-5)

    def seconds(name: str, keys: list[str], limit: float = 1e9) -> float:
        case = run.CASES["fp32<-fp32"]
        return jobs.seconds(MODELS[name], case, [keys], now, CPU, 30, limit)

    keys = ["ours_foreach", "foreach_lerp"]
    assert seconds("resnet50", keys) < seconds("vit-l16", keys) < seconds("gpt2-xl", keys)
    assert seconds("resnet50", keys) > 1.5 * seconds("resnet50", keys[:1])
    assert seconds("resnet50", keys, 0.0) < seconds("resnet50", keys)
    compiled = seconds("resnet50", [*keys, "compiled_lerp"]) - seconds("resnet50", keys)
    assert compiled > 161 * jobs.COMPILED_TENSOR
    assert all(0 < value < 0.1 for value in jobs.pace(Stopwatch(CPU, 1000)))


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def arguments(out: Path | None, *, minutes: float | None = None, resume: bool = False, **changed):
    given = {"models": "tiny", "device": "cpu", "peers": "foreach_lerp", "quick": True}
    return SimpleNamespace(
        **{**given, **changed}, out=out, minutes=minutes, resume=resume, averages=None
    )


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three jobs of one model; the names of those that were measured."""
    monkeypatch.setitem(MODELS, "tiny", TINY)
    monkeypatch.setattr(run, "CASES", {name: run.CASES[name] for name in [*run.CASES][:3]})
    # The smallest flush: no figure is looked at here.
    small = machine.describe(CPU).__class__
    monkeypatch.setattr(
        run, "describe", lambda device: small("cpu", "M", 1, 1, "", 1, None, None, "", {})
    )
    return []


def measures(clock: Clock, seconds: dict[str, float], seen: list[str]):
    """What stands in for `run.measured`: takes its time of the clock."""

    def measured(model: Model, case: str, *rest: object) -> list[Row]:
        seen.append(case)
        clock.now += seconds[case]
        return [Row(model.name, 1, 1, case, "constant", LIMIT, "skipped", f"call {len(seen)}")]

    return measured


def test_minutes_are_kept_and_the_rest_is_resumed(
    few: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock, out = Clock(), tmp_path / "r.json"
    estimates = {"fp32<-fp32": 60.0, "fp32<-bf16": 150.0, "bf16<-bf16": 50.0}
    by_case = {case: name for name, case in run.CASES.items()}
    monkeypatch.setattr(jobs, "seconds", lambda _, case, *rest: estimates[by_case[case]])
    monkeypatch.setattr(run, "measured", measures(clock, estimates, few))
    run.main(arguments(out, minutes=2.0), clock)
    # 60 s, then 150 would be too many, and 50 are not.
    assert few == ["fp32<-fp32", "bf16<-bf16"]
    assert [row.case for row in Results.load(out).rows] == few
    printed = capsys.readouterr().out
    assert printed.startswith("What the jobs should take, of ")
    assert "    60 s    0.0 GiB  tiny fp32<-fp32: 1 peers\n" in printed
    assert "3 jobs, some 4.3 minutes\n" in printed
    assert "\n1 jobs did not fit into 2 minutes; each should take 2.5 to 2.5." in printed
    # It does not fit into the same time either, and into more.
    run.main(arguments(out, minutes=2.0, resume=True), clock)
    assert few == ["fp32<-fp32", "bf16<-bf16"]
    run.main(arguments(out, minutes=3.0, resume=True), clock)
    assert few == ["fp32<-fp32", "bf16<-bf16", "fp32<-bf16"]
    # As a run without a limit would have it.
    assert [row.case for row in Results.load(out).rows] == [*run.CASES]
    assert "did not fit" not in capsys.readouterr().out.rpartition("What the jobs")[2]


def test_estimates_are_corrected_by_the_jobs_that_were_made(
    few: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = Clock()
    monkeypatch.setattr(jobs, "seconds", lambda *rest: 30.0)
    # Each takes twice as long as was estimated: after the second one 60 s are not left.
    monkeypatch.setattr(run, "measured", measures(clock, dict.fromkeys(run.CASES, 60.0), few))
    run.main(arguments(tmp_path / "r.json", minutes=2.5), clock)
    assert len(few) == 2
    assert clock.now == 1120.0


def test_minutes_leave_the_compiled_peer_out_unless_it_is_named(
    few: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = []
    monkeypatch.setattr(run, "planned", lambda _, keys, *rest: asked.append(keys) or {})
    for given in (
        {"minutes": 1.0, "peers": None, "quick": False},
        {"minutes": None, "peers": None, "quick": False},
        {"minutes": 1.0, "peers": "compiled_lerp"},
    ):
        run.main(arguments(tmp_path / "r.json", **given))
    assert ["compiled_lerp" in keys for keys in asked] == [False, True, True]
    assert len(asked[0]) == len(peers.PEERS) - 1
    assert "- Nothing was timed." in capsys.readouterr().out


def test_a_run_that_was_cut_off_is_gone_on_with(
    few: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "r.json"
    measured = measures(Clock(), dict.fromkeys(run.CASES, 1.0), few)

    def cut_off(*arguments: object) -> list[Row]:
        rows = measured(*arguments)
        if len(few) == 2:
            raise KeyboardInterrupt
        return rows

    monkeypatch.setattr(run, "measured", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run.main(arguments(out))
    before = Results.load(out)
    assert [row.reason for row in before.rows] == ["call 1"]
    run.main(arguments(out, resume=True))
    assert few == [*run.CASES][:2] + [*run.CASES][1:]
    after = Results.load(out)
    assert [(row.case, row.reason) for row in after.rows] == [
        *zip(run.CASES, ["call 1", "call 3", "call 4"], strict=True)
    ]
    # Without being told so, a run begins anew.
    run.main(arguments(out))
    assert [row.reason for row in Results.load(out).rows] == ["call 5", "call 6", "call 7"]
    replace(after, commit="another").save(out)
    with pytest.raises(SystemExit, match="is of commit another on"):
        run.main(arguments(out, resume=True))
    with pytest.raises(SystemExit, match="there is no results file"):
        run.main(arguments(tmp_path / "none.json", resume=True))


def test_a_job_that_fails_is_a_row_and_not_the_end(
    few: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(model: Model, case: str, *rest: object) -> list[Row]:
        few.append(case)
        raise torch.OutOfMemoryError("CUDA out of memory")

    out = tmp_path / "r.json"
    monkeypatch.setattr(run, "measured", fails)
    run.main(arguments(out))
    assert few == [*run.CASES]
    rows = Results.load(out).rows
    assert {(row.peer, row.status, row.reason) for row in rows} == {
        (LIMIT, "error", "OutOfMemoryError: CUDA out of memory")
    }
    assert run._broken(CPU) is None
    # Where the GPU has to be given up, what was measured is in the file, and --resume goes on.
    monkeypatch.setattr(run, "_broken", lambda device: "AcceleratorError: illegal access")
    with pytest.raises(SystemExit, match=r"left the GPU unusable .*illegal access.* --resume"):
        run.main(arguments(out))
    assert len(Results.load(out).rows) == 1


def test_a_file_is_whole_when_writing_it_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "r.json"
    results = Results("update", machine.describe(CPU), "c", "d", [])
    results.save(out)
    write = Path.write_text

    def cut_off(path: Path, text: str) -> None:
        write(path, text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut_off)
    with pytest.raises(KeyboardInterrupt):
        replace(results, commit="other").save(out)
    assert Results.load(out) == results


def test_a_cut_off_run_of_steps_is_gone_on_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []

    def noted(name: str, *rest: object) -> list[StepRow]:
        seen.append(name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return [StepRow(name, 1, NO_EMA, "timed", "", Spread.of([1.0]), Spread.of([0.0]))]

    monkeypatch.setattr(step, "measured", noted)
    out = tmp_path / "s.json"
    with pytest.raises(KeyboardInterrupt):
        step.main(arguments(out, models=None))
    step.main(arguments(out, models=None, resume=True))
    assert seen == ["cnn", "vit", "vit", "gpt"]
    assert [row.model for row in Results.load(out).rows] == ["cnn", "vit", "gpt"]
