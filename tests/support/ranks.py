"""What several processes find together, joined by gloo."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def forkserver() -> multiprocessing.context.ForkServerContext:
    """Processes of it are forked from one that has imported what takes seconds, and computed
    nothing.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cfpo_kernels", "torch.distributed.tensor"])
    return context


def found_by_ranks(run: Callable[..., Any], *arguments: Any, n: int) -> list[Any]:
    """What run(rank, *arguments) returns in each of `n` processes, as torch.save keeps it.

    Processes of a fork server end without taking Python down. Those that do abort now and then: a
    thread of gloo's may hold the last tensor still, and destroy_process_group does not end it.
    """
    forkserver()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _rank, (run, arguments, n, folder), nprocs=n, start_method="forkserver"
        )
        return [torch.load(f"{folder}/{rank}") for rank in range(n)]


def _rank(
    rank: int, run: Callable[..., Any], arguments: tuple[Any, ...], n: int, folder: str
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n)
    torch.save(run(rank, *arguments), f"{folder}/{rank}")
    dist.barrier()  # nobody leaves whom another still waits for
