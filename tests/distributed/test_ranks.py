"""A test that runs on several ranks fails as one on a single rank does, and never hangs."""

import os
import time

import pytest
import torch.distributed as dist

from tests.ranks import run

pytestmark = pytest.mark.distributed


def _returns(value):
    return dist.get_rank(), dist.get_world_size(), value


def _raises():
    if dist.get_rank() == 1:
        raise LookupError("on rank one")
    dist.barrier()


def _dies():
    if dist.get_rank() == 1:
        os._exit(3)
    time.sleep(60)


def _hangs():
    if dist.get_rank() == 0:
        time.sleep(60)


def test_what_each_rank_returns_is_returned() -> None:
    assert run(3, _returns, "x") == [(0, 3, "x"), (1, 3, "x"), (2, 3, "x")]


def test_a_failing_rank_fails_with_its_traceback() -> None:
    with pytest.raises(AssertionError, match=r"rank 1 of 2:\n(.*\n)*LookupError: on rank one"):
        run(2, _raises)


def test_a_dead_rank_fails() -> None:
    with pytest.raises(AssertionError, match="rank 1 died"):
        run(2, _dies)


def test_a_hanging_rank_fails() -> None:
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"ranks .*0.* hang"):
        run(2, _hangs, timeout=4)
    assert time.monotonic() - began < 30
