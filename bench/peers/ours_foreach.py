"""This library's foreach backend."""

from functools import partial

from bench.peers import ours_triton

NAME = "ema_triton (foreach)"

memory = ours_triton.memory

build = partial(ours_triton.build, backend="foreach")
