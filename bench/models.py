"""The models that are measured, as the names and shapes of their parameters.

Each list is generated from its architecture's formula and checked against the published number of
parameters. Buffers are left out: the peers disagree about what to do with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]


@dataclass(frozen=True)
class Model:
    """A model's parameters by name, as lists of shapes.

    Attributes:
        name: What it is called on the command line and in tables.
        shapes: The shape of each parameter, by its dotted name.
        big: Whether a CPU needs minutes for it, so that it must be asked for by name.
    """

    name: str
    shapes: dict[str, Shape]
    big: bool = False

    @property
    def elements(self) -> int:
        """How many parameters the model has."""
        return sum(map(math.prod, self.shapes.values()))


def make_module(model: Model, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model as modules nested as its names say, with random parameters."""
    root = nn.Module()
    for name, shape in model.shapes.items():
        owner = root
        *path, leaf = name.split(".")
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(leaf, nn.Parameter(torch.randn(shape, dtype=dtype, device=device)))
    return root


def _affine(name: str, weight: Shape, bias: int) -> Named:
    yield f"{name}.weight", weight
    yield f"{name}.bias", (bias,)


def _linear(name: str, inputs: int, outputs: int) -> Named:
    return _affine(name, (outputs, inputs), outputs)


def _norm(name: str, channels: int) -> Named:
    return _affine(name, (channels,), channels)


def _conv(name: str, inputs: int, outputs: int, size: int) -> Named:
    return _affine(name, (outputs, inputs, size, size), outputs)


def resnet50() -> Named:
    """He et al. 2015, as in torchvision."""

    def conv_norm(name: str, index: int, inputs: int, outputs: int, size: int) -> Named:
        yield f"{name}conv{index}.weight", (outputs, inputs, size, size)
        yield from _norm(f"{name}bn{index}", outputs)

    yield from conv_norm("", 1, 3, 64, 7)
    inputs = 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
        for block in range(blocks):
            name = f"layer{stage}.{block}."
            yield from conv_norm(name, 1, inputs, width, 1)
            yield from conv_norm(name, 2, width, width, 3)
            yield from conv_norm(name, 3, width, 4 * width, 1)
            if block == 0:
                yield f"{name}downsample.0.weight", (4 * width, inputs, 1, 1)
                yield from _norm(f"{name}downsample.1", 4 * width)
            inputs = 4 * width
    yield from _linear("fc", 2048, 1000)


def vit_l16() -> Named:
    """Dosovitskiy et al. 2020, 224 pixels, 1000 classes, as in timm."""
    width = 1024
    yield "cls_token", (1, 1, width)
    yield "pos_embed", (1, 1 + (224 // 16) ** 2, width)
    yield from _conv("patch_embed.proj", 3, width, 16)
    for block in range(24):
        name = f"blocks.{block}"
        yield from _norm(f"{name}.norm1", width)
        yield from _linear(f"{name}.attn.qkv", width, 3 * width)
        yield from _linear(f"{name}.attn.proj", width, width)
        yield from _norm(f"{name}.norm2", width)
        yield from _linear(f"{name}.mlp.fc1", width, 4 * width)
        yield from _linear(f"{name}.mlp.fc2", 4 * width, width)
    yield from _norm("norm", width)
    yield from _linear("head", width, 1000)


def gpt2_xl() -> Named:
    """Radford et al. 2019, output layer tied to the embedding, as in transformers."""
    width = 1600
    yield "wte.weight", (50257, width)
    yield "wpe.weight", (1024, width)
    for block in range(48):
        name = f"h.{block}"
        yield from _norm(f"{name}.ln_1", width)
        # GPT-2's weights are transposed: [inputs, outputs].
        yield from _affine(f"{name}.attn.c_attn", (width, 3 * width), 3 * width)
        yield from _affine(f"{name}.attn.c_proj", (width, width), width)
        yield from _norm(f"{name}.ln_2", width)
        yield from _affine(f"{name}.mlp.c_fc", (width, 4 * width), 4 * width)
        yield from _affine(f"{name}.mlp.c_proj", (4 * width, width), width)
    yield from _norm("ln_f", width)


def sdxl_unet() -> Named:
    """The UNet of Stable Diffusion XL, Podell et al. 2023, as in diffusers."""
    widths, depths, time_width, text_width = (320, 640, 1280), (0, 2, 10), 1280, 2048

    def resnet(name: str, inputs: int, outputs: int) -> Named:
        yield from _norm(f"{name}.norm1", inputs)
        yield from _conv(f"{name}.conv1", inputs, outputs, 3)
        yield from _linear(f"{name}.time_emb_proj", time_width, outputs)
        yield from _norm(f"{name}.norm2", outputs)
        yield from _conv(f"{name}.conv2", outputs, outputs, 3)
        if inputs != outputs:
            yield from _conv(f"{name}.conv_shortcut", inputs, outputs, 1)

    def attention(name: str, width: int, context: int) -> Named:
        yield f"{name}.to_q.weight", (width, width)
        yield f"{name}.to_k.weight", (width, context)
        yield f"{name}.to_v.weight", (width, context)
        yield from _linear(f"{name}.to_out.0", width, width)

    def transformer(name: str, width: int, depth: int) -> Named:
        if depth == 0:
            return
        yield from _norm(f"{name}.norm", width)
        yield from _linear(f"{name}.proj_in", width, width)
        for index in range(depth):
            block = f"{name}.transformer_blocks.{index}"
            yield from _norm(f"{block}.norm1", width)
            yield from attention(f"{block}.attn1", width, width)
            yield from _norm(f"{block}.norm2", width)
            yield from attention(f"{block}.attn2", width, text_width)
            yield from _norm(f"{block}.norm3", width)
            yield from _linear(f"{block}.ff.net.0.proj", width, 8 * width)
            yield from _linear(f"{block}.ff.net.2", 4 * width, width)
        yield from _linear(f"{name}.proj_out", width, width)

    yield from _conv("conv_in", 4, widths[0], 3)
    yield from _linear("time_embedding.linear_1", widths[0], time_width)
    yield from _linear("time_embedding.linear_2", time_width, time_width)
    yield from _linear("add_embedding.linear_1", 2816, time_width)
    yield from _linear("add_embedding.linear_2", time_width, time_width)

    skips = [widths[0]]
    inputs = widths[0]
    for level, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for index in range(2):
            yield from resnet(f"down_blocks.{level}.resnets.{index}", inputs, width)
            yield from transformer(f"down_blocks.{level}.attentions.{index}", width, depth)
            inputs = width
            skips.append(width)
        if width != widths[-1]:
            yield from _conv(f"down_blocks.{level}.downsamplers.0.conv", width, width, 3)
            skips.append(width)
    yield from resnet("mid_block.resnets.0", inputs, inputs)
    yield from transformer("mid_block.attentions.0", inputs, depths[-1])
    yield from resnet("mid_block.resnets.1", inputs, inputs)
    for level, (width, depth) in enumerate(zip(widths[::-1], depths[::-1], strict=True)):
        for index in range(3):
            yield from resnet(f"up_blocks.{level}.resnets.{index}", inputs + skips.pop(), width)
            yield from transformer(f"up_blocks.{level}.attentions.{index}", width, depth)
            inputs = width
        if width != widths[0]:
            yield from _conv(f"up_blocks.{level}.upsamplers.0.conv", width, width, 3)
    yield from _norm("conv_norm_out", widths[0])
    yield from _conv("conv_out", widths[0], 4, 3)


def llama_7b() -> Named:
    """Touvron et al. 2023, as in transformers."""
    width, hidden, vocabulary = 4096, 11008, 32000
    yield "embed_tokens.weight", (vocabulary, width)
    for block in range(32):
        name = f"layers.{block}"
        for part in "qkvo":
            yield f"{name}.self_attn.{part}_proj.weight", (width, width)
        yield f"{name}.mlp.gate_proj.weight", (hidden, width)
        yield f"{name}.mlp.up_proj.weight", (hidden, width)
        yield f"{name}.mlp.down_proj.weight", (width, hidden)
        yield f"{name}.input_layernorm.weight", (width,)
        yield f"{name}.post_attention_layernorm.weight", (width,)
    yield "norm.weight", (width,)
    yield "lm_head.weight", (vocabulary, width)


def _same(count: int, size: int) -> dict[str, Shape]:
    # Two to a module, as in most models; a module's tensors are read with one look.
    return {f"{index // 2}.{'wb'[index % 2]}": (size,) for index in range(count)}


ARCHITECTURES = [
    Model("resnet50", dict(resnet50())),
    Model("vit-l16", dict(vit_l16())),
    Model("gpt2-xl", dict(gpt2_xl()), big=True),
    Model("sdxl-unet", dict(sdxl_unet()), big=True),
    Model("llama-7b", dict(llama_7b()), big=True),
]
COUNTS = [Model(f"{4**power}x1Ki", _same(4**power, 1024)) for power in range(7)]
SIZES = [Model(f"1x2^{power}", _same(1, 2**power), big=power > 25) for power in range(10, 32, 3)]
MANY_SMALL = Model("1000x64", _same(1000, 64))

MODELS = {model.name: model for model in [*ARCHITECTURES, MANY_SMALL, *COUNTS, *SIZES]}
