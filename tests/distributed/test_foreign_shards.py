"""A state that another rank saved: refused where it has other elements, before any is loaded."""

import re
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from ema_triton import ModelEMA
from ema_triton.distributed.dtensor import local_part
from tests.ranks import run
from tests.sharded import (
    Net,
    assert_same,
    by_fsdp,
    change,
    in_hybrid,
    in_two_dimensions,
    of_bfloat16,
    replicated,
    wholes_of,
)

pytestmark = pytest.mark.distributed


class Even(nn.Module):
    """Parts of one shape on every rank, which nothing but the mesh coordinate tells apart."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, dtype=dtype))
        self.spin = nn.Parameter(torch.randn(8, dtype=torch.complex64))
        self.register_buffer("shift", torch.zeros(7))
        self.register_buffer("count", torch.tensor(0))


def placed(model, mesh, place):
    for name, parameter in [*model.named_parameters()]:
        parts = distribute_tensor(parameter.data, mesh, [place])
        model.register_parameter(name, nn.Parameter(parts))
    return model


def even():
    return placed(Even(), init_device_mesh("cpu", (dist.get_world_size(),)), Shard(0))


def even_bfloat16():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return placed(Even(torch.bfloat16), mesh, Shard(0))


def in_columns():
    model = Even()
    model.spin = nn.Parameter(torch.zeros(8, 2))
    model.weight = nn.Parameter(torch.zeros(4, 4))
    return placed(model, init_device_mesh("cpu", (dist.get_world_size(),)), Shard(1))


def averaged(build, steps=2):
    torch.manual_seed(0)
    ema = ModelEMA(build())
    for step in range(steps):
        change(ema.model, step)
        ema.update(0.3)
    return ema


def _full(ema):
    state = [ema.state_dict(full_state_dict=True)]
    dist.broadcast_object_list(state)
    return state[0]


def _save(build, folder):
    ema = averaged(build)
    torch.save(ema.state_dict(), folder / f"{dist.get_rank()}.pt")
    state = ema.state_dict(full_state_dict=True)
    if state:
        torch.save(state, folder / "full.pt")
    dcp.save({"ema": ema}, checkpoint_id=folder / "dcp")
    return _full(ema)


def _load(build, path, load):
    """The error on this rank; what it has then, where there is none."""
    ema = averaged(build, 1)
    before = _full(ema)
    error = None
    with CommDebugMode() as seen, warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            if load == "path":
                ema.load_weights(path)
            else:
                # As weights_only, a mesh can be read once its groups are there.
                getattr(ema, load)(torch.load(path, weights_only=False))
        except ValueError as caught:
            error = str(caught)
    assert seen.get_total_counts() == 0
    own = _full(ema)
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    if all(errors):
        assert_same(own, before)
    return error or own


REMEDY = (
    "Nothing was loaded. Save ema.state_dict(full_state_dict=True), and load it on all ranks by "
    "load_state_dict(state, full_state_dict=True); or use torch.distributed.checkpoint; or load on "
    "each rank what that rank saved."
)


@pytest.mark.parametrize(
    ("build", "load"), [(even, "load_weights"), (even_bfloat16, "load_state_dict")]
)
def test_rank_0s_parts_are_refused_on_rank_1(build, load, tmp_path) -> None:
    run(2, _save, build, tmp_path)
    loaded, error = run(2, _load, build, tmp_path / "0.pt", load)
    assert isinstance(loaded, dict)
    assert error == (
        "The state does not have this rank's part of 'weight', 'spin': in the state 'weight' is "
        "sharded over 2 ranks (S(0)), at mesh coordinate (0,) with shape (2, 3); here it is "
        "sharded over 2 ranks (S(0)), at mesh coordinate (1,) with shape (2, 3). Another rank "
        f"saved it, or a run with other ranks. {REMEDY}"
    )


def test_a_file_of_torch_save_is_refused_too(tmp_path) -> None:
    run(2, _save, even, tmp_path)
    _, error = run(2, _load, even, tmp_path / "0.pt", "path")
    assert REMEDY in error


def test_of_uneven_parts_the_first_that_differs_is_named(tmp_path) -> None:
    run(2, _save, by_fsdp, tmp_path)
    _, error = run(2, _load, by_fsdp, tmp_path / "0.pt", "load_state_dict")
    assert "'scale' is sharded over 2 ranks (S(0)), at mesh coordinate (0,)" in error
    assert "'first.weight', 'first.bias', 'norm.weight', 'norm.bias' and 2 more:" in error


@pytest.mark.parametrize(("build", "ranks"), [(even, 2), (even_bfloat16, 2), (by_fsdp, 3),
                                              (in_hybrid, 4), (in_two_dimensions, 4),
                                              (replicated, 2)])  # fmt: skip
def test_each_ranks_own_file_is_loaded(build, ranks, tmp_path) -> None:
    """The control."""
    states = run(ranks, _save, build, tmp_path)
    for found in run(ranks, _load_own, build, tmp_path):
        assert_same(found, states[0])


def _load_own(build, folder):
    return _load(build, folder / f"{dist.get_rank()}.pt", "load_state_dict")


def test_replicas_of_a_part_have_the_same_part(tmp_path) -> None:
    """Of HSDP, in one dimension of the mesh the parts are the same."""
    states = run(4, _save, in_hybrid, tmp_path)
    outcomes = run(4, _load, in_hybrid, tmp_path / "3.pt", "load_state_dict")
    assert [isinstance(outcome, dict) for outcome in outcomes] == [False, True, False, True]
    # What replicas of two parts load is the whole.
    for found in run(4, _load_replica, in_hybrid, tmp_path):
        assert_same(found, states[0])


def _load_replica(build, folder):
    return _load(build, folder / f"{dist.get_rank() % 2}.pt", "load_state_dict")


def test_of_two_dimensions_both_coordinates_count(tmp_path) -> None:
    run(4, _save, in_two_dimensions, tmp_path)
    outcomes = run(4, _load, in_two_dimensions, tmp_path / "2.pt", "load_state_dict")
    assert [isinstance(outcome, dict) for outcome in outcomes] == [False, False, True, False]
    assert "part of 'scale', 'first.weight'" in outcomes[0]  # 'scale' is split in one of them
    assert "part of 'first.weight'" in outcomes[3]
    assert "at mesh coordinate (1, 0) with" in outcomes[3]


def test_replicated_tensors_are_any_ranks(tmp_path) -> None:
    states = run(2, _save, replicated, tmp_path)
    for found in run(2, _load, replicated, tmp_path / "0.pt", "load_state_dict"):
        assert_same(found, states[0])
    # And any model's: each rank takes its part.
    for found in run(2, _load, by_fsdp, tmp_path / "0.pt", "load_state_dict"):
        assert_same(found, states[0])


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_part_is_refused_on_every_rank_of_another_number(ranks, tmp_path) -> None:
    """Also on rank 0, without waiting for another rank."""
    run(2, _save, even, tmp_path)
    for rank, error in enumerate(run(ranks, _load, even, tmp_path / "0.pt", "load_state_dict")):
        assert "is sharded over 2 ranks (S(0)), at mesh coordinate (0,)" in error
        assert (
            f"here it is sharded over {ranks} ranks (S(0)), at mesh coordinate ({rank},)" in error
        )
        assert REMEDY in error


@pytest.mark.parametrize("build", [Net, in_columns])
def test_parts_of_another_sharding_are_refused_on_every_rank(build, tmp_path) -> None:
    """Nor is it gathered from a file's mesh, whose ranks need not be there."""
    source = by_fsdp if build is Net else in_rows
    run(2, _save, source, tmp_path)
    here = "not sharded" if build is Net else r"sharded over 2 ranks \(S\(1\)\), at mesh coordinate"
    for error in run(2, _load, build, tmp_path / "0.pt", "load_state_dict"):
        assert re.search(
            rf"ranks \(S\(0\)\), at mesh coordinate \(0,\).*; here it is {here}", error
        )
        assert REMEDY in error


def in_rows():
    model = in_columns()
    return placed(plainly(model), init_device_mesh("cpu", (dist.get_world_size(),)), Shard(0))


def plainly(model):
    for name, parameter in [*model.named_parameters()]:
        model.register_parameter(name, nn.Parameter(parameter.full_tensor().detach()))
    return model


def _of_residuals_alone(folder):
    """The weights are this rank's, their residuals are not."""
    ema = averaged(even_bfloat16)
    mine = ema.state_dict(clone=True)
    theirs = torch.load(folder / "0.pt", weights_only=False)
    before = _full(ema)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if dist.get_rank() == 0:
            ema.load_state_dict({**mine, "residuals": theirs["residuals"]})
            error = ""
        else:
            with pytest.raises(ValueError, match="does not have this rank's part") as caught:
                ema.load_state_dict({**mine, "residuals": theirs["residuals"]})
            error = str(caught.value)
    assert_same(_full(ema), before)
    return error


def test_a_residual_of_another_rank_is_refused(tmp_path) -> None:
    run(2, _save, even_bfloat16, tmp_path)
    assert "part of 'weight': in the state 'weight' is" in run(2, _of_residuals_alone, tmp_path)[1]


def _of_another_shape():
    """As of a mesh whose coordinate is this rank's, but whose part is not."""
    ema = averaged(even)
    state = ema.state_dict(clone=True)
    weight = state["weights"]["weight"]
    weight._local_tensor = weight._local_tensor[:1].clone()
    with pytest.raises(ValueError, match=r"with shape \(1, 3\); here it is .* with shape \(2, 3\)"):
        ema.load_state_dict(state)


def test_a_part_of_another_shape_is_refused() -> None:
    run(2, _of_another_shape)


def _as_advised(build, folder, expected):
    ema = averaged(build, 1)
    state = torch.load(folder / "full.pt") if dist.get_rank() == 0 else None
    ema.load_state_dict(state, full_state_dict=True)
    assert_same(_full(ema), expected)
    ema = averaged(build, 1)
    dcp.load({"ema": ema}, checkpoint_id=folder / "dcp")
    assert_same(_full(ema), expected)


@pytest.mark.parametrize("build", [even, even_bfloat16, by_fsdp, of_bfloat16])
def test_what_the_error_advises_works(build, tmp_path) -> None:
    states = run(2, _save, build, tmp_path)
    run(2, _as_advised, build, tmp_path, states[0])


def _parts_as_the_whole():
    ema = averaged(even)
    with pytest.raises(ValueError, match="does not have this rank's part of 'weight', 'spin'"):
        ema.load_state_dict(ema.state_dict(), full_state_dict=True)


def test_parts_given_as_the_full_state_are_an_error_on_every_rank() -> None:
    run(2, _parts_as_the_whole)


def _of_a_framework(folder):
    """As accelerate saves and loads an object: rank 0's, on every rank."""
    pytest.importorskip("ignite")
    from ema_triton import EMAHandler

    torch.manual_seed(0)
    handler = EMAHandler(even())
    if dist.get_rank() == 0:
        torch.save(handler.state_dict(), folder / "custom_checkpoint_0.pkl")
    dist.barrier()
    state = torch.load(folder / "custom_checkpoint_0.pkl", weights_only=False)
    before = wholes_of(handler.ema)
    if dist.get_rank() == 1:
        with pytest.raises(ValueError, match=re.escape(REMEDY)):
            handler.load_state_dict(state)
        with pytest.raises(ValueError, match=re.escape(REMEDY)):
            handler.load_state_dict(state, strict=False)
    for name, value in wholes_of(handler.ema).items():
        assert torch.equal(value, before[name])


def test_a_handler_refuses_what_a_framework_loads_everywhere(tmp_path) -> None:
    run(2, _of_a_framework, tmp_path)


def _that_the_mesh_tells(folder):
    """The control of these tests: the parts differ, and the file's mesh is equal to this one's."""
    state = torch.load(folder / "0.pt", weights_only=False)["weights"]["weight"]
    own = averaged(even).state_dict()["weights"]["weight"]
    assert isinstance(state, DTensor)
    assert state.device_mesh == own.device_mesh
    return local_part(own).tolist()


def test_parts_differ_though_their_meshes_are_equal(tmp_path) -> None:
    run(2, _save, even, tmp_path)
    first, second = run(2, _that_the_mesh_tells, tmp_path)
    assert first != second
