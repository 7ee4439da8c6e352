"""Processes that train together: tensors of all ranks, with gradient, and the end of a launch."""

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows):
        sizes = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(world_size())]
        dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
        sizes = [int(size) for size in sizes]
        padded = nn.functional.pad(rows.contiguous(), (0, 0) * (rows.ndim - 1) + (0, max(sizes) - len(rows)))
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        ctx.start = sum(sizes[: dist.get_rank()])
        ctx.count = len(rows)
        return torch.cat([part[:size] for part, size in zip(parts, sizes)])

    @staticmethod
    def backward(ctx, gradient):
        return gradient[ctx.start : ctx.start + ctx.count] * world_size()


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows (n, …) of all ranks, one rank after the other: (sum of n, …); n may differ.

    If every rank computes the same loss of the result and gradients are averaged over ranks, as
    DistributedDataParallel does, the averaged gradient is that of the loss: each rank sends back the gradient of its
    own rows times the number of ranks, and nothing more needs to be communicated.
    """
    return _GatherRows.apply(rows) if world_size() > 1 else rows


def leaves_launch(main: Callable[..., None]) -> Callable[..., None]:
    """A command that closes the process group that it opened when it is done.

    Threads of a group that is still open while the interpreter ends abort the process, now and then. After an error
    nothing is closed: other ranks may be waiting for this one, and closing would wait for them.
    """

    @functools.wraps(main)
    def command(*args, **kwargs) -> None:
        was_open = dist.is_available() and dist.is_initialized()
        main(*args, **kwargs)
        if dist.is_available() and dist.is_initialized() and not was_open:
            dist.destroy_process_group()

    return command
