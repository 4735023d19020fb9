"""ema-pytorch with its foreach option."""

from functools import partial

from bench.peers import ema_pytorch

NAME = "ema-pytorch (foreach)"

build = partial(ema_pytorch.build, use_foreach=True)
