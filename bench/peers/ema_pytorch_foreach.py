"""ema-pytorch with its foreach option."""

from functools import partial

from bench.peers import ema_pytorch

NAME = "ema-pytorch (foreach)"

memory = ema_pytorch.memory

build = partial(ema_pytorch.build, use_foreach=True)
