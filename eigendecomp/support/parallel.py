"""Several processes on one fit: each has an equal share of every batch, and all take the same step.

Started by ``torchrun`` (or ``accelerate launch``), a fit joins the others through Accelerate, on CPUs or GPUs alike. In
a single process every function here returns what it was given.
"""

import atexit
import os
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


@cache
def _state():
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from accelerate import PartialState

    atexit.register(_leave)  # a process that ends while still joined can abort, after all its work is done
    return PartialState(cpu=not torch.cuda.is_available())


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def precision() -> torch.dtype | None:
    """The precision of the target's passes under ``accelerate launch --mixed_precision bf16``; None for its own.

    Gradients, directions and the objective stay in the precision of the target's parameters.

    Raises:
        ValueError: for a precision other than bf16.
    """
    name = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if name not in ("no", "bf16"):
        raise ValueError(
            f"ACCELERATE_MIXED_PRECISION={name!r} is not supported: single samples' gradients underflow in it; "
            "use 'bf16' or 'no'"
        )
    return torch.bfloat16 if name == "bf16" else None


def processes() -> int:
    """How many processes take part."""
    state = _state()
    return 1 if state is None else state.num_processes


def leads() -> bool:
    """Whether this process speaks for all: writes files, shows progress."""
    state = _state()
    return state is None or state.is_main_process


def share(n: int) -> slice:
    """This process's part of n things.

    Raises:
        ValueError: if they cannot be shared equally.
    """
    state = _state()
    if state is None:
        return slice(n)
    if n % state.num_processes:
        raise ValueError(
            f"a batch of {n} examples cannot be shared equally by {state.num_processes} processes; choose batch_size "
            "so that its examples are a multiple of the processes"
        )
    size = n // state.num_processes
    return slice(state.process_index * size, (state.process_index + 1) * size)


def sums(*tensors: Tensor) -> Callable[[], list[Tensor]]:
    """Starts to add up tensors of one dtype over processes, all in one go; what is returned waits for the sums.

    They have no gradient. Every process must start its sums in the same order.
    """
    given = [tensor.detach() for tensor in tensors]
    if _state() is None:
        return lambda: given
    flat = torch.cat([tensor.flatten() for tensor in given])
    handle = torch.distributed.all_reduce(flat, async_op=True)

    def wait() -> list[Tensor]:
        _await(handle, flat)
        totals = flat.split([tensor.numel() for tensor in given])
        return [total.view_as(tensor) for total, tensor in zip(totals, given, strict=True)]

    return wait


def gathered(x: Tensor) -> Tensor:
    """The rows of all processes, without gradient; each gives as many."""
    given = x.detach().contiguous()
    if _state() is None:
        return given
    parts = [torch.empty_like(given) for _ in range(processes())]
    _await(torch.distributed.all_gather(parts, given, async_op=True), given)
    return torch.cat(parts)


def _await(handle: torch.distributed.Work | None, x: Tensor) -> None:
    """Wait for what was started with ``x``."""
    assert handle is not None
    # Waits are short. On CPUs a core that falls asleep in each takes longer to come back than it would have waited.
    while x.device.type == "cpu" and not handle.is_completed():
        os.sched_yield()
    handle.wait()
