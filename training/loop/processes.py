"""What a run on several processes needs beyond transformers' Trainer: a common start, agreement, and a clear end.

Everything here does nothing in a run of one process.
"""

import atexit
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object
from torch.distributed.fsdp import FSDPModule

PREPARATION = timedelta(days=2)
"""How long processes wait for the one that prepares an archive or makes the local copy of the pairs."""

_OF_OTHERS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
"""What stands in the errors that torch raises where another process is gone; gloo's have no type of their own."""


def fork_workers_from_a_server(arguments: Any, program: str) -> None:
    """Let a server of one thread fork the workers of loaders, unless the user chose how they start.

    A worker that is forked from a process with threads, as training has them, hangs now and then: it has the locks
    that other threads held, and nobody to free them. Python 3.14 does the same by default.

    Args:
        arguments: `TrainingArguments`, changed in place.
        program: name of the module to import in the server, so that no worker imports it anew.
    """
    chosen = getattr(arguments, "dataloader_multiprocessing_context", None)
    if arguments.dataloader_num_workers and chosen is None and "forkserver" in multiprocessing.get_all_start_methods():
        arguments.dataloader_multiprocessing_context = "forkserver"
        multiprocessing.get_context("forkserver").set_forkserver_preload(["__main__", program])


def start_on_cpu(timeout: float) -> None:
    """Join the other processes over gloo, with a limit to how long one waits for another.

    transformers passes `ddp_timeout` on for accelerators alone: on the CPU it would be half an hour whatever is asked.

    Args:
        timeout: seconds that a collective operation may take.
    """
    # Programs started by MPI have other variables; accelerate joins those.
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)
    if started and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        # gloo's threads need the interpreter to drop the tensors of the last operations. Of a thread that asks for it
        # while it is torn down, Python 3.11 ends the stack in the midst of C++, which aborts the process, all its work
        # done, by SIGABRT ("terminate called without an active exception"): in about one of a hundred sharded runs.
        atexit.register(time.sleep, 0.2)  # in which the interpreter is free


def shard_on_any_device() -> None:
    """Let the next Accelerator shard the model on the CPU too, where accelerate passes over FSDP in silence.

    It makes FSDP of what it takes for several GPUs; the device stays the CPU.
    """
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and PartialState().distributed_type is DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


@contextmanager
def as_before_sharding(model: Any) -> Iterator[None]:
    """Give a model that FSDP2 shards the class that it had before.

    FSDP2 puts a class of its own in its place. Saved like that, a checkpoint carries torch's files as its code instead
    of the model's, and its `auto_map` names a class that is not in them.
    """
    sharded = type(model)
    if issubclass(sharded, FSDPModule):
        model.__class__ = next(cls for cls in sharded.__mro__[1:] if not issubclass(cls, FSDPModule))
    try:
        yield
    finally:
        model.__class__ = sharded


@contextmanager
def in_turn() -> Iterator[None]:
    """Let the first process do something before the others, and the first of each machine before the rest of it.

    What is made on the way is found by those that come later, on the same disk or on that of each machine. The others
    wait for days if need be, `ddp_timeout` or not.
    """
    state = PartialState()
    if state.num_processes == 1:
        yield
        return
    turns = dist.new_group(backend="gloo", timeout=PREPARATION)
    mine = 0 if state.process_index == 0 else 1 if state.local_process_index == 0 else 2
    for turn in range(3):
        if turn == mine:
            yield
        dist.barrier(group=turns)


def check_same_everywhere(values: Mapping[str, Any]) -> None:
    """Compare what must be the same in all processes of a run; each of them must call this.

    Args:
        values: by name; anything that can be pickled and compared.

    Raises:
        ValueError: in every process, if one has another value than the first; says which, and both values.
    """
    if PartialState().num_processes == 1:
        return
    everywhere = gather_object([dict(values)])
    for name, first in everywhere[0].items():
        others = [process for process, of_process in enumerate(everywhere) if of_process.get(name) != first]
        if others:
            raise ValueError(
                f"The processes of this run differ in {name}: process 0 has {first!r}, process {others[0]} has "
                f"{everywhere[others[0]].get(name)!r}; {len(others)} of {len(everywhere)} differ from process 0. "
                "Start all with the same command, and see that every machine reads the same, whole folders."
            )


def maximum_everywhere(mine: Sequence[float], device: torch.device) -> list[float]:
    """The largest of each number over the processes of a run; each of them must call this."""
    if PartialState().num_processes == 1:
        return list(mine)
    numbers = torch.tensor(mine, device=device)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers.tolist()


@contextmanager
def lost_processes_explained() -> Iterator[None]:
    """End with a message instead of torch's traceback where another process of the run ended or no longer answers."""
    try:
        yield
    except RuntimeError as error:
        known = isinstance(error, dist.DistError) or any(part in str(error) for part in _OF_OTHERS)
        if not known or not dist.is_initialized():
            raise
        raise SystemExit(
            f"Error: process {dist.get_rank()} of {dist.get_world_size()} lost another process of this run, or waited "
            f"for it in vain for longer than `ddp_timeout`: {str(error).splitlines()[0]}\nWhat that process wrote "
            "last says why. Start the same command with `--resume_from_checkpoint auto` to go on from the newest "
            "checkpoint."
        ) from error
