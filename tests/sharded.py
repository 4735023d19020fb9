"""Models sharded in every way that the tests try, and their tensors in one piece."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


class Net(nn.Module):
    """Odd sizes: the rows divide by neither two, three nor four ranks."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7, dtype=dtype)
        self.norm = nn.LayerNorm(7, dtype=dtype)
        self.last = nn.Linear(7, 1, dtype=dtype)
        self.scale = nn.Parameter(torch.ones(1, dtype=dtype))
        self.register_buffer("shift", torch.zeros(7))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x):
        x = self.norm(self.first(x)) + self.shift.to(x.dtype)
        return self.last(x.relu()) * self.scale


def shard(net, **options):
    fully_shard(net.first, **options)
    fully_shard(net.last, **options)
    return fully_shard(net, **options)


def by_fsdp():
    return shard(Net())


def of_bfloat16():
    return shard(Net(torch.bfloat16))


def of_float16():
    return shard(Net(torch.float16))


def in_mixed_precision():
    return shard(Net(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))


def offloaded():
    return shard(Net(), offload_policy=CPUOffloadPolicy(pin_memory=False))


def kept_gathered():
    return shard(Net(), reshard_after_forward=False)


def in_columns_and_rows(mesh):
    plan = {
        "first": ColwiseParallel(output_layouts=Replicate()),
        "last": RowwiseParallel(input_layouts=Replicate()),
    }
    return parallelize_module(Net(), mesh, plan)


def in_tensor_parallel():
    return in_columns_and_rows(init_device_mesh("cpu", (dist.get_world_size(),)))


def in_two_dimensions():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return shard(in_columns_and_rows(mesh["tp"]), mesh=mesh["dp"])


def in_hybrid():
    return shard(Net(), mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts")))


def replicated():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    net = Net()
    for module in net.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            copies = distribute_tensor(parameter.data, mesh, [Replicate()])
            module.register_parameter(name, nn.Parameter(copies))
        for name, buffer in [*module.named_buffers(recurse=False)]:
            module.register_buffer(name, distribute_tensor(buffer, mesh, [Replicate()]))
    return net


MODELS = {
    by_fsdp: (2, 3, 4),
    of_bfloat16: (3,),
    of_float16: (3,),
    in_mixed_precision: (2,),
    offloaded: (2,),
    kept_gathered: (2,),
    in_tensor_parallel: (2, 3),
    in_two_dimensions: (4,),
    in_hybrid: (4,),
    replicated: (2,),
}


DTYPES = {
    of_bfloat16: torch.bfloat16,
    of_float16: torch.float16,
    in_mixed_precision: torch.bfloat16,
}


CASES = [(model, size) for model, sizes in MODELS.items() for size in sizes]


def whole(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def wholes(model):
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def wholes_of(ema):
    state = [ema.state_dict(full_state_dict=True)]
    dist.broadcast_object_list(state)
    return state[0]["weights"]


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for part in ("weights", "residuals"):
        assert [*state[part]] == [*expected[part]]
        for name, value in expected[part].items():
            assert torch.equal(state[part][name], value), name
    assert {k: v for k, v in state.items() if k not in ("weights", "residuals")} == {
        k: v for k, v in expected.items() if k not in ("weights", "residuals")
    }


def change(model, step):
    """What a training step does: other values, the same whatever the sharding."""
    for number, parameter in enumerate(model.parameters()):
        chance = torch.Generator().manual_seed(1000 * step + number)
        delta = torch.randn(parameter.shape, generator=chance)
        with torch.no_grad():
            if isinstance(parameter, DTensor):
                mesh = parameter.device_mesh
                everywhere = [Replicate()] * mesh.ndim
                delta = distribute_tensor(delta, mesh, everywhere, src_data_rank=None)
                delta = delta.redistribute(placements=parameter.placements)
            parameter.add_(delta)
    model.shift.add_(1.0)
    model.count.add_(1)
