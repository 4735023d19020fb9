"""Functions run by several processes that form a gloo process group, one per rank."""

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

# Forked from a process that has imported all of it and started no thread, a rank begins at once.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.preloaded"])


def run(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 60) -> list:
    """Call `function(*args)` on every rank, and return what each returned.

    The first rank that fails fails the test with its traceback, and all are killed; so they are
    after `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        ends: dict[Connection, int] = {}
        workers = []
        for rank in range(world_size):
            here, there = _processes.Pipe(duplex=False)
            worker = _processes.Process(
                target=_work,
                # Pickled here: torch would send tensors through shared memory, which ends with us.
                args=(there, folder, rank, world_size, timeout, pickle.dumps((function, args))),
            )
            worker.start()
            there.close()
            ends[here] = rank
            workers.append(worker)
        try:
            return _collect(ends, world_size, time.monotonic() + timeout)
        finally:
            for worker in workers:
                worker.kill()
                worker.join()


def _collect(ends: dict[Connection, int], world_size: int, deadline: float) -> list:
    results: dict[int, Any] = {}
    while len(results) < world_size:
        ready = wait([end for end, rank in ends.items() if rank not in results], 1)
        for end in ready:
            rank = ends[end]
            try:
                failed, result = pickle.loads(end.recv_bytes())
            except EOFError:
                raise AssertionError(f"rank {rank} died") from None
            if failed:
                raise AssertionError(f"rank {rank} of {world_size}:\n{result}")
            results[rank] = result
        if time.monotonic() > deadline:
            missing = sorted(set(range(world_size)) - set(results))
            raise AssertionError(f"ranks {missing} of {world_size} hang")
    return [results[rank] for rank in range(world_size)]


def _work(
    end: Connection,
    folder: str,
    rank: int,
    world_size: int,
    timeout: float,
    pickled: bytes,
) -> None:
    function, args = pickle.loads(pickled)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{Path(folder) / 'store'}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout / 2),
    )
    try:
        failed, result = False, function(*args)
    except BaseException:
        failed, result = True, traceback.format_exc()
    end.send_bytes(pickle.dumps((failed, result)))
    if not failed:
        torch.distributed.barrier()  # a rank that left would take the store with it
    torch.distributed.destroy_process_group()
