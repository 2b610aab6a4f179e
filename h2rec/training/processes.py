"""The processes that train together: started by us, or by ``torchrun`` and what sets the same variables."""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed.rendezvous import rendezvous

from h2rec.training.files import write_json

# For all processes that a launcher has started to come.
_MEETING_TIME = timedelta(minutes=5)
# For an exchange: the others wait in one while the first process reads. PyTorch's own limit for NCCL is ten minutes.
_EXCHANGE_TIME = timedelta(hours=1)


def launched_world_size() -> int | None:
    """How many processes a launcher has started, of which this is one; None without a launcher."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE"} <= os.environ.keys() else None


def is_first_process() -> bool:
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))
    return rank == 0


@contextlib.contextmanager
def launched_group(accelerator: str) -> Iterator[None]:
    """The group of the processes that a launcher has started.

    Raises:
        ChildProcessError: another of them is gone, or did not come within five minutes.
    """
    rank = int(os.environ["RANK"])
    os.environ.setdefault("LOCAL_RANK", str(rank))
    rank_zero_only.rank = rank
    if accelerator == "gpu":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        store, _, world_size = next(rendezvous("env://", timeout=_MEETING_TIME))
        dist.init_process_group(
            _backend(accelerator), timeout=_EXCHANGE_TIME, store=store, rank=rank, world_size=world_size
        )
    except RuntimeError as error:
        raise ChildProcessError(f"the {launched_world_size()} processes did not meet ({error})") from error
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise ChildProcessError(f"another process is gone; resume the run to go on ({error})") from error
        raise
    dist.destroy_process_group()  # after an error it could wait for the others


def train_in_processes(
    function: Callable[..., None], arguments: tuple[Any, ...], num_processes: int, accelerator: str
) -> None:
    """Calls ``function(*arguments)`` in as many new processes, which are a group.

    Raises:
        ChildProcessError: one was killed, or raised what is no built-in exception.
    """
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder)
        try:
            torch.multiprocessing.spawn(
                _one_process, (function, arguments, num_processes, accelerator, meeting), num_processes
            )
        except torch.multiprocessing.ProcessRaisedException as error:
            raise _cause(meeting) or ChildProcessError(str(error)) from error
        except torch.multiprocessing.ProcessExitedException as error:
            raise ChildProcessError(f"{error}; resume the run to go on") from error


def _one_process(
    rank: int,
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    num_processes: int,
    accelerator: str,
    meeting: Path,
) -> None:
    # Sent when the process that started this one is gone: Python's handler waits for an exchange that may never end.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Lightning finds the group that is there, and by LOCAL_RANK that it need not start processes.
    os.environ["LOCAL_RANK"] = str(rank)
    rank_zero_only.rank = rank
    dist.init_process_group(
        _backend(accelerator),
        init_method=f"file://{meeting}/rendezvous",
        timeout=_EXCHANGE_TIME,
        rank=rank,
        world_size=num_processes,
    )
    if accelerator == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // num_processes))
    try:
        function(*arguments)
    except Exception as error:
        _leave_cause(error, rank, meeting)
        raise
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo outlive the group; Python aborts if one lets go of a tensor while it ends


def _backend(accelerator: str) -> str:
    return "nccl" if accelerator == "gpu" else "gloo"


def _leave_cause(error: Exception, rank: int, meeting: Path) -> None:
    """The first process to fail says why; the others fail because they lost it."""
    said = meeting / f"error-{rank}.json"
    write_json(said, [type(error).__name__, str(error)])
    with contextlib.suppress(FileExistsError):
        os.link(said, meeting / "error.json")


def _cause(meeting: Path) -> Exception | None:
    """What `_leave_cause` left, if it was a built-in exception."""
    if not (meeting / "error.json").exists():
        return None
    name, message = json.loads((meeting / "error.json").read_text(encoding="utf-8"))
    kind = getattr(builtins, name, None)
    if kind and issubclass(kind, ValueError):
        kind = ValueError  # a UnicodeDecodeError cannot be made of a message
    return kind(message) if kind else None
