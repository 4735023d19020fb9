"""The folder: what is written, resumed, refused, and left by a process that was killed."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ema_triton import Constant, EMABank, ModelEMA, PowerFunction
from ema_triton.checkpoint.interop import read_file
from ema_triton.posthoc import Snapshots

pytest.importorskip("safetensors")

PAIR = {"0.05": PowerFunction(sigma_rel=0.05), "0.10": PowerFunction(sigma_rel=0.10)}
TARGET = PowerFunction(sigma_rel=0.08)


class Run:
    """A training that is the same each time up to an update, with another one's EMA beside it."""

    def __init__(self, folder: Path, seed: int = 0, **options: Any) -> None:
        torch.manual_seed(0)
        self.model, self.seed = nn.Linear(3, 2).double(), seed
        self.bank = EMABank(self.model, PAIR, **options)
        self.tracked = ModelEMA(self.model)
        self.tracked.schedule = TARGET
        self.snapshots = Snapshots(folder)
        self.snapshots.record(self.bank)

    def go_on(self, updates: int, every: int = 5) -> None:
        while self.bank.update_index < updates:
            generator = torch.Generator().manual_seed(1000 * self.seed + self.bank.update_index)
            with torch.no_grad():
                for parameter in self.model.parameters():
                    step = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.add_(0.1 * step)
            self.bank.update()
            self.tracked.update(self.tracked.next_momentum())
            if self.bank.update_index % every == 0:
                self.snapshots.save(self.bank)

    def checkpoint(self) -> dict[str, Any]:
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "bank": self.bank.state_dict(),
                "tracked": self.tracked.state_dict(),
                "snapshots": self.snapshots.state_dict(),
            }
        )

    def load(self, state: dict[str, Any], order: str) -> None:
        self.model.load_state_dict(state["model"])
        self.tracked.load_state_dict(state["tracked"])
        for what in order.split():
            getattr(self, what).load_state_dict(state[what])

    def check(self, at: int | None = None) -> None:
        """What is rebuilt from the folder is the EMA that was tracked."""
        result = Snapshots(self.snapshots.folder).reconstruct(TARGET, at=at)
        assert result.profile_error < 0.01
        for name, value in self.tracked.ema_model.state_dict().items():
            difference = float((result.weights[name].double() - value).abs().max())
            assert difference < 0.01  # the weights themselves are about 1


def test_the_files_are_the_averages_and_load_as_weights(tmp_path) -> None:
    run = Run(tmp_path)
    run.go_on(10)
    names = sorted(path.name for path in tmp_path.iterdir())
    files = [f"000000{at}-{name}.safetensors" for at in ("05", "10") for name in PAIR]
    assert names == [*files, "log.json"]
    weights: Any = read_file(tmp_path / "00000010-0.10.safetensors")
    expected = run.bank["0.10"].ema_model.weight.float()
    assert torch.equal(weights["weight"], expected)
    other = ModelEMA(run.model)
    other.load_weights(tmp_path / "00000010-0.10.safetensors")
    assert torch.equal(other.ema_model.weight.float(), expected)


def test_print_says_how_many_from_when_and_how_large(tmp_path) -> None:
    snapshots = Snapshots(tmp_path, dtype=torch.bfloat16)
    assert str(snapshots) == f"Snapshots('{tmp_path}'): none yet"
    bank = EMABank(nn.Linear(1000, 100), PAIR)
    for _ in range(3):
        bank.update()
        snapshots.save(bank)
    said = str(snapshots)
    assert "6 of 2 averages (0.05, 0.10), from update 1 to 3, 1.2 MB in bfloat16" in said
    assert "inexact: updates 1 to 1 were not recorded" in said
    assert "inexact" not in str(Run(tmp_path / "other").snapshots)


def test_names_of_averages_are_safe_file_names(tmp_path) -> None:
    names = ["../up", "a/b", "σ 0.05", "x:y*?"]
    bank = EMABank(nn.Linear(2, 1), {name: Constant(0.5) for name in names})
    snapshots = Snapshots(tmp_path / "in")
    snapshots.save(bank)
    assert {path.name for path in tmp_path.iterdir()} == {"in"}
    written = {p.name for p in (tmp_path / "in").iterdir() if p.suffix == ".safetensors"}
    assert len(written) == 4
    assert all("/" not in name and ":" not in name and "*" not in name for name in written)


ORDERS = ["bank snapshots", "snapshots bank"]


@pytest.mark.parametrize("order", ORDERS)
def test_a_resumed_run_goes_on_and_newer_snapshots_do_not_count(tmp_path, order) -> None:
    run = Run(tmp_path)
    run.go_on(40)
    run.go_on(43)
    state = run.checkpoint()
    run.go_on(60)
    resumed = Run(tmp_path, seed=1)  # from 43 on it is another training
    resumed.load(state, order)
    resumed.go_on(50)
    log = json.loads((tmp_path / "log.json").read_text())
    assert [one["update_index"] for one in log["snapshots"]][-2:] == [50, 50]
    assert (tmp_path / "00000060-0.05.safetensors").exists()  # and is ignored
    assert "from update 5 to 50," in str(Snapshots(tmp_path))
    assert not log["inexact"]
    resumed.check()
    resumed.go_on(60)
    resumed.check()


def test_that_check_can_fail(tmp_path) -> None:
    run = Run(tmp_path)
    run.go_on(40)
    with torch.no_grad():
        run.tracked.ema_model.weight.add_(0.02)
    with pytest.raises(AssertionError):
        run.check()


def test_a_stale_file_of_the_same_name_does_not_count(tmp_path) -> None:
    run = Run(tmp_path)
    run.go_on(20)
    state = run.checkpoint()
    run.go_on(40)
    stale = {path: path.read_bytes() for path in tmp_path.glob("*25-*.safetensors")}
    resumed = Run(tmp_path, seed=1)
    resumed.load(state, ORDERS[0])
    resumed.go_on(40)
    for path, content in stale.items():
        path.write_bytes(content)  # as if the process had been killed after the log was written
    assert "14 of 2 averages" in str(Snapshots(tmp_path))
    resumed.check()


def test_without_its_state_the_folders_log_is_gone_on_from(tmp_path) -> None:
    run = Run(tmp_path)
    run.go_on(40)
    state = run.checkpoint()
    run.go_on(60)
    resumed = Run(tmp_path, seed=1)
    resumed.load(state, "bank")
    resumed.go_on(60)
    assert not json.loads((tmp_path / "log.json").read_text())["inexact"]
    resumed.check()


def test_updates_that_were_not_recorded_are_the_schedules_and_said(tmp_path) -> None:
    run = Run(tmp_path)
    run.go_on(40)
    run.go_on(43)
    state = run.checkpoint()
    resumed = Run(tmp_path, seed=1)
    resumed.load(state, "bank")
    resumed.go_on(60)
    said = r"does not tell all.*: updates 41 to 43 were not recorded\. profile_error is not"
    with pytest.raises(ValueError, match=rf"{said}.*approximate=True gives"):
        resumed.check()
    with pytest.warns(UserWarning, match=said):
        result = resumed.snapshots.reconstruct(TARGET, approximate=True)
    assert result.profile_error < 0.01
    # Before them the log is exact.
    assert resumed.snapshots.reconstruct(TARGET, at=40).update_index == 40


def test_other_averages_do_not_fit_the_folder(tmp_path) -> None:
    Run(tmp_path).go_on(5)
    with pytest.raises(ValueError, match=r"are of the averages '0\.05', '0\.10', but got 'ema'"):
        Snapshots(tmp_path).save(ModelEMA(nn.Linear(3, 2)))
    with pytest.raises(TypeError, match=r"got a Linear\. Of an EMAHandler, give handler\.ema"):
        Snapshots(tmp_path).save(nn.Linear(3, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="The snapshots' log cannot be read"):
        Snapshots(tmp_path).load_state_dict({})


class Case:
    """What makes a log inexact."""

    def __init__(self, reason: str, disturb: Any, **options: Any) -> None:
        self.reason, self.disturb, self.options = reason, disturb, options


def by_tensor(ema: ModelEMA, snapshots: Snapshots) -> None:
    # The recorder is told of momenta as the backend gets them: on a GPU a tensor.
    assert ema._planner.recorder is not None
    ema._planner.recorder("update", ema.update_index, [torch.tensor(0.5)])
    ema.update_index += 1


def replaced(ema: ModelEMA, snapshots: Snapshots) -> None:
    ema.ema_model.weight = nn.Parameter(torch.zeros(2, 3))


def captured(ema: ModelEMA, snapshots: Snapshots) -> None:
    ema._planner.captured.append(ema._planner.plan)


def spared(ema: ModelEMA, snapshots: Snapshots) -> None:
    with torch.no_grad():
        ema.model.weight[0, 0] = float("nan")


def nothing(ema: ModelEMA, snapshots: Snapshots) -> None:
    pass


BF16 = {"ema_dtype": torch.bfloat16}
CASES = {
    "tensor": Case("a momentum was a tensor", by_tensor),
    "replaced": Case("tensors of the EMA were replaced", replaced),
    "captured": Case("a CUDA graph has an update, whose replays are not seen", captured),
    "spared": Case("nonfinite='skip' kept values out of the EMA", spared, nonfinite="skip"),
    "nearest": Case(
        "'nearest' rounds the EMA's torch.bfloat16", nothing, precision="nearest", **BF16
    ),
    "stochastic": Case("'stochastic' rounds", nothing, precision="stochastic", **BF16),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_the_host_cannot_know_is_refused_with_its_reason(tmp_path, case) -> None:
    ema = ModelEMA(nn.Linear(3, 2), **case.options)
    ema.schedule = Constant(0.5)
    snapshots = Snapshots(tmp_path)
    snapshots.record(ema)
    for update_index in range(6):
        if update_index == 3:
            case.disturb(ema, snapshots)
        ema.update(0.5)
        snapshots.save(ema)
    with pytest.raises(ValueError, match=f"does not tell all.*{case.reason}"):
        snapshots.reconstruct(Constant(0.5))
    with pytest.warns(UserWarning, match=case.reason):
        Snapshots(tmp_path).reconstruct(Constant(0.5), approximate=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nonfinite": "skip"},
        BF16,
        {**BF16, "exclude": "bias"},
        {"precision": "nearest"},
        {"as_module": False},
        {"ema_model": nn.Linear(3, 2)},
    ],
    ids=lambda options: "-".join(options),
)
def test_other_emas_have_an_exact_log(tmp_path, options) -> None:
    ema = ModelEMA(nn.Linear(3, 2), **options)
    snapshots = Snapshots(tmp_path)
    snapshots.record(ema)
    for update_index in range(6):
        if update_index == 3:
            ema.model.weight = nn.Parameter(torch.ones(2, 3))  # the online model may move
            ema.model.bias.data = torch.ones(2)
        ema.update(0.5)
        snapshots.save(ema)
    assert snapshots.reconstruct(Constant(0.5)).profile_error < 1e-7


def test_an_unknown_momentum_without_a_schedule_is_refused_in_any_case(tmp_path) -> None:
    ema = ModelEMA(nn.Linear(3, 2))
    snapshots = Snapshots(tmp_path)
    snapshots.record(ema)
    by_tensor(ema, snapshots)
    snapshots.save(ema)
    with (
        pytest.warns(UserWarning, match="a momentum was a tensor"),
        pytest.raises(ValueError, match="The momentum of update 1 is unknown"),
    ):
        snapshots.reconstruct(Constant(0.5), approximate=True)


def test_what_is_unknown_later_does_not_matter_before(tmp_path) -> None:
    ema = ModelEMA(nn.Linear(3, 2))
    snapshots = Snapshots(tmp_path)
    snapshots.save(ema)
    ema.update(0.5)
    snapshots.save(ema)
    by_tensor(ema, snapshots)
    snapshots.save(ema)
    assert snapshots.reconstruct(Constant(0.5), at=1).profile_error < 1e-7
    with pytest.raises(ValueError, match="a momentum was a tensor"):
        snapshots.reconstruct(Constant(0.5), at=2)


def test_averages_of_a_bank_that_begin_with_other_weights_have_sources_of_their_own(
    tmp_path,
) -> None:
    schedules = {"a": Constant(0.5), "b": Constant(0.25)}
    bank = EMABank(nn.Linear(3, 2), schedules)
    snapshots = Snapshots(tmp_path)
    snapshots.record(bank)
    bank["a"].load_weights(nn.Linear(3, 2).state_dict())
    bank.update()
    snapshots.save(bank)
    # Were the initial weights the same, 0.5 and 0.25 would give 0.375 exactly.
    with pytest.warns(UserWarning, match=r"the profile error is 15\.9%"):
        snapshots.reconstruct(Constant(0.375))


def test_a_copy_of_the_ema_records_nothing(tmp_path) -> None:
    run = Run(tmp_path)
    run.go_on(5)
    before = run.snapshots.state_dict()
    for twin in (copy.deepcopy(run.bank), pickle.loads(pickle.dumps(run.bank))):
        twin.update()
        twin.sync()
        twin["0.05"].sync()
    assert run.snapshots.state_dict() == before
    run.bank.update()
    assert run.snapshots.state_dict() != before


def test_an_ema_without_recorder_asks_nothing_of_it() -> None:
    ema = ModelEMA(nn.Linear(3, 2))
    ema.update(0.5)
    ema.sync()
    assert ema._planner.recorder is None


def test_the_state_is_one_string_whatever_it_has(tmp_path) -> None:
    run = Run(tmp_path)
    run.go_on(7)
    state = run.snapshots.state_dict()
    assert [*map(type, state.values())] == [str]


def test_snapshots_during_a_swap_are_of_the_ema(tmp_path) -> None:
    ema = ModelEMA(nn.Linear(3, 2))
    snapshots = Snapshots(tmp_path)
    with torch.no_grad():
        ema.model.weight.fill_(7)
    ema.update(0.5)
    expected = ema.ema_model.weight.clone()
    with ema.swapped():
        snapshots.save(ema)
    weights: Any = read_file(tmp_path / "00000001-ema.safetensors")
    assert torch.equal(weights["weight"], expected)


def test_a_handlers_ema_is_recorded_as_the_engine_runs(tmp_path) -> None:
    engine_module = pytest.importorskip("ignite.engine")
    from ema_triton import EMAHandler

    model = nn.Linear(3, 2)

    def step(engine: Any, batch: Any) -> None:
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))

    engine = engine_module.Engine(step)
    handler = EMAHandler(model, momentum=0.1)
    handler.attach(engine)
    snapshots = Snapshots(tmp_path)
    snapshots.save(handler.ema)
    save = engine_module.Events.ITERATION_COMPLETED
    engine.add_event_handler(save, lambda: snapshots.save(handler.ema))
    engine.run(range(10), max_epochs=1)
    result = Snapshots(tmp_path).reconstruct(Constant(0.1))
    assert (result.update_index, result.profile_error < 1e-7) == (10, True)
    assert torch.equal(result.weights["weight"], handler.ema_model.weight)


def test_a_new_training_in_the_folder_of_an_old_one_is_warned_of(tmp_path) -> None:
    Run(tmp_path).go_on(10)
    with pytest.warns(UserWarning, match="has snapshots of another training, up to update 10, and"):
        Run(tmp_path).go_on(5)
    assert "2 of 2 averages (0.05, 0.10), from update 5 to 5" in str(Snapshots(tmp_path))


SAVING = """
import sys, torch
from torch import nn
from ema_triton import EMABank, PowerFunction
from ema_triton.posthoc import Snapshots

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Linear(256, 256)
bank = EMABank(model, {s: PowerFunction(sigma_rel=float(s)) for s in ("0.05", "0.10")})
snapshots = Snapshots(sys.argv[1])
snapshots.record(bank)
print("ready", flush=True)
while True:
    with torch.no_grad():
        model.weight.add_(0.01)
    bank.update()
    snapshots.save(bank)
"""


def test_killed_20_times_while_saving_the_folder_stays_valid(tmp_path) -> None:
    """Children are forked from one process that has imported all, and each is killed."""
    killed = subprocess.run(
        [sys.executable, "-c", KILLING, str(tmp_path), SAVING],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert killed.returncode == 0, killed.stderr
    found = json.loads(killed.stdout)
    assert len(found) == 20
    assert sum(one["left"] for one in found) >= 5  # of these, some in the middle of a file
    assert all(one["snapshots"] > 0 for one in found)


KILLING = """
import json, os, signal, sys, time
from pathlib import Path
import torch
from torch import nn
from ema_triton import EMABank, PowerFunction
from ema_triton.posthoc import Snapshots

folder, program = Path(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
warm = EMABank(nn.Linear(2, 2), {"warm": PowerFunction(sigma_rel=0.1)})
warm.update()
Snapshots(folder / "warm").save(warm)  # imports what children would import 20 times
found = []
for number in range(20):
    child = os.fork()
    if child == 0:
        sys.argv[1], sys.stdout = str(folder), open(os.devnull, "w")
        try:
            exec(program)
        finally:
            os._exit(1)
    log, before = folder / "log.json", time.time()
    while time.time() - before < 30:  # until it has saved in this run
        if log.exists() and log.stat().st_mtime > before and len(list(folder.glob("*.s*"))) >= 2:
            break
        time.sleep(0.001)
    time.sleep(0.0023 * (number + 1))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL  # it had no error before
    snapshots = Snapshots(folder)
    entries = snapshots._present()
    result = snapshots.reconstruct(PowerFunction(sigma_rel=0.1), approximate=True)
    assert result.weights["weight"].isfinite().all()
    left = (folder / ".new").exists()
    found.append({"snapshots": len(entries), "left": left})
print(json.dumps(found))
"""


MEMORY = """
import sys
import torch
from ema_triton import PowerFunction
from ema_triton.posthoc import Snapshots
from ema_triton.checkpoint.interop import read_file

def peak():  # ru_maxrss would be the parent's, if that is larger
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024

torch.set_num_threads(1)
Snapshots(sys.argv[3]).reconstruct(PowerFunction(sigma_rel=0.1))  # imports
if sys.argv[2] == "warm":
    snapshots = Snapshots(sys.argv[1])
    before = peak()
    result = snapshots.reconstruct(PowerFunction(sigma_rel=0.08))
else:
    from pathlib import Path
    before = peak()
    result = [read_file(path) for path in Path(sys.argv[1]).glob("*.safetensors")]
print(peak() - before)
"""


def test_peak_memory_is_a_few_tensors_beside_the_result(tmp_path) -> None:
    for name, elements in ("small", 8), ("large", 1 << 20):
        model = nn.ParameterList([nn.Parameter(torch.ones(elements)) for _ in range(24)])
        bank = EMABank(model, PAIR)
        snapshots = Snapshots(tmp_path / name, dtype=torch.bfloat16)
        snapshots.record(bank)
        for update_index in range(1, 25):
            bank.update()
            if update_index % 8 == 0:
                snapshots.save(bank)
    size = 96 << 20  # of the model in fp32, twice of each of the 6 snapshots

    def measure(how: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(tmp_path / "large"), how, str(tmp_path / "small")],
            capture_output=True,
            text=True,
            check=True,
        )
        return int(done.stdout)

    # Two tensors are added up at a time: 16 MiB in fp64, 4 of the file that is open, 8 to convert
    # one. The sums of all tensors would be 192 MiB.
    allowed = size + (48 << 20)
    assert measure("warm") < allowed
    assert measure("all") > allowed  # control: so would be the snapshots


def test_a_killed_process_leaves_nothing_behind_after_the_next_save(tmp_path) -> None:
    run = Run(tmp_path)
    (tmp_path / ".new").mkdir()
    (tmp_path / ".new" / "half a file").write_text("x")
    run.go_on(5)
    assert not (tmp_path / ".new").exists()


def test_a_snapshot_that_was_deleted_is_done_without(tmp_path) -> None:
    run = Run(tmp_path)
    run.go_on(60)
    (tmp_path / "00000005-0.05.safetensors").unlink()
    run.check()
    assert "23 of 2 averages" in str(run.snapshots)


def test_an_averaged_buffer_that_is_not_persistent_is_in_no_snapshot(tmp_path) -> None:
    model = nn.BatchNorm1d(2)
    model.register_buffer("scratch", torch.zeros(2), persistent=False)
    ema = ModelEMA(model, handle_buffers="update")
    snapshots = Snapshots(tmp_path)
    snapshots.record(ema)
    ema.update(0.5)
    snapshots.save(ema)
    result = snapshots.reconstruct(Constant(0.5))
    assert result.weights.keys() == model.state_dict().keys()


def test_snapshots_in_fp64_give_an_average_in_fp64(tmp_path) -> None:
    run = Run(tmp_path)
    run.snapshots.dtype = torch.float64
    run.go_on(60)
    again = Snapshots(tmp_path).reconstruct(PAIR["0.10"])
    expected = run.bank["0.10"].ema_model.weight
    assert again.weights["weight"].dtype == torch.float64
    torch.testing.assert_close(again.weights["weight"], expected, rtol=1e-9, atol=1e-9)
    assert not torch.equal(again.weights["weight"].float().double(), expected)
