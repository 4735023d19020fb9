"""Banks of models on several ranks: bit by bit what single EMAs are there."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from ema_triton import EMABank
from ema_triton.distributed.dtensor import local_part
from tests.banks import assert_equal, schedules, singles_of, update
from tests.ranks import run
from tests.sharded import Net, assert_same, by_fsdp, change, of_bfloat16, whole, wholes, wholes_of
from tests.states import same

pytestmark = pytest.mark.distributed

COUNT = 2


def by_ddp():
    return DistributedDataParallel(Net())


def bare(model):
    return getattr(model, "module", model)


def _goes_on(build, options, folder):
    torch.manual_seed(0)
    model = build()
    bank, singles = EMABank(model, schedules(COUNT), **options), singles_of(model, COUNT, **options)
    assert bank.model is bare(model)
    for step in range(3):
        change(bare(model), step)
        with CommDebugMode() as seen:
            bank.update()
        assert seen.get_total_counts() == 0
        update(singles)
        assert_equal_parts(bank, singles)
    for name, ema in bank.items():
        assert ema.distance().distance == singles[name].distance().distance
        online = wholes(bare(model))
        averaged = wholes_of(ema)
        with ema.swapped():
            assert torch.equal(
                whole(bare(model).first.weight).to(averaged["first.weight"].dtype),
                averaged["first.weight"]
                .to(bare(model).first.weight.dtype)
                .to(averaged["first.weight"].dtype),
            )
        assert all(torch.equal(value, online[key]) for key, value in wholes(bare(model)).items())
    _resumes(model, bank, singles, options, folder)


def _resumes(model, bank, singles, options, folder):
    dcp.save({"ema": bank}, checkpoint_id=folder)
    full = [bank.state_dict(full_state_dict=True)]
    if dist.get_rank():
        assert full[0] == {}
    others = []
    for way in ("dcp", "full", "own"):
        other = EMABank(model, schedules(COUNT), **{**options, "seed": 99})
        change(bare(model), 9)
        other.update()
        if way == "dcp":
            dcp.load({"ema": other}, checkpoint_id=folder)
        elif way == "full":
            given = full[0] if dist.get_rank() == 0 else [None, {}, ["anything"]][len(options) % 3]
            other.load_state_dict(given, full_state_dict=True)
        else:
            other.load_state_dict(bank.state_dict())
        assert_equal_parts(other, singles)
        assert other.schedule == schedules(COUNT)
        others.append(other)
    change(bare(model), 4)
    update(singles)
    for other in [bank, *others]:
        other.update()
        assert_equal_parts(other, singles)
    whole_of_bank = bank.state_dict(full_state_dict=True)
    for name, ema in singles.items():
        expected = ema.state_dict(full_state_dict=True)
        if dist.get_rank() == 0:
            assert_same(whole_of_bank["averages"][name], expected)


def assert_equal_parts(bank, singles):
    """This rank's parts."""
    if not any(hasattr(p, "to_local") for p in bank.model.parameters()):
        assert_equal(bank, singles)
        return
    for name, ema in bank.items():
        found, expected = ema.state_dict(), singles[name].state_dict()
        for part in ("weights", "residuals"):
            assert [*found[part]] == [*expected[part]]
            for key, value in expected[part].items():
                assert same(local_part(found[part][key]), local_part(value)), (name, key)
        assert found["update_index"] == expected["update_index"]


CASES = [
    (by_ddp, {}),
    (by_ddp, {"ema_dtype": torch.bfloat16, "momentum_scale": {"first*": 0.5}}),
    (by_fsdp, {}),
    (by_fsdp, {"ema_dtype": torch.float16, "nonfinite": "skip", "handle_buffers": "update"}),
    (of_bfloat16, {"precision": "stochastic", "momentum_scale": {"first*": 0.5}}),
    (of_bfloat16, {"ema_dtype": torch.float32}),
]


@pytest.mark.parametrize(("build", "options"), CASES)
def test_a_bank_on_two_ranks_is_bit_by_bit_single_emas_and_resumes(
    build, options, tmp_path
) -> None:
    run(2, _goes_on, build, options, tmp_path)


def _saves(folder):
    torch.manual_seed(0)
    model = by_fsdp()
    bank = EMABank(model, schedules(COUNT), ema_dtype=torch.bfloat16)
    for step in range(2):
        change(model, step)
        bank.update()
    dcp.save({"ema": bank}, checkpoint_id=folder)
    return bank.state_dict(full_state_dict=True)


def _loads(folder, expected):
    bank = EMABank(by_fsdp(), schedules(COUNT), ema_dtype=torch.bfloat16)
    dcp.load({"ema": bank}, checkpoint_id=folder)
    found = bank.state_dict(full_state_dict=True)
    if dist.get_rank() == 0:
        for name in bank:
            assert_same(found["averages"][name], expected["averages"][name])


def test_a_checkpoint_of_a_bank_fits_another_number_of_ranks(tmp_path) -> None:
    states = run(2, _saves, tmp_path)
    run(3, _loads, tmp_path, states[0])


def _misfits(where):
    bank = EMABank(by_fsdp(), schedules(COUNT))
    before = bank.state_dict(clone=True)
    state = bank.state_dict(full_state_dict=True)
    if dist.get_rank() == 0:
        if where == "names":
            state["averages"]["other"] = state["averages"].pop("warm-up")
        else:
            state["averages"]["warm-up"]["weights"]["first.bias"] = torch.ones(99)
        for average in state["averages"].values():
            average["update_index"] = 17
    with pytest.raises(ValueError, match=r"warm-up(.|\n)*(first\.bias|other)|other(.|\n)*warm-up"):
        bank.load_state_dict(state, full_state_dict=True)
    assert bank.update_index == 0
    after = bank.state_dict()
    for name in bank:
        for key, value in before["averages"][name]["weights"].items():
            assert torch.equal(
                local_part(after["averages"][name]["weights"][key]), local_part(value)
            )


@pytest.mark.parametrize("where", ["names", "shape"])
def test_a_state_on_rank_0_that_does_not_fit_is_loaded_by_no_rank(where) -> None:
    run(2, _misfits, where)
