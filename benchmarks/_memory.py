"""Peak memory of one call, above what was in memory before it."""

import ctypes
import gc
import statistics
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peak_extra_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """CUDA: bytes of torch's caching allocator. CPU: resident memory of this process, whoever allocated it.

    Results and gradients that the call leaves behind count; pages of files do not, such as code that the kernel had
    taken back and the call reads in again. It may do both within one call, so that the CPU's is the median of three.
    None where the kernel does not tell: Linux with glibc does.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    if not _forget_the_past():
        return None
    return statistics.median(_resident_extra_bytes(call) for _ in range(3))


def peak_anonymous_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """As `peak_extra_bytes` on the CPU, without pages of files; from samples, as the kernel keeps no such mark."""
    if not _forget_the_past():
        return None
    before = _status_bytes("RssAnon")
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(1e-3):
            peak = max(peak, _status_bytes("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return max(peak, _status_bytes("RssAnon")) - before


def _resident_extra_bytes(call: Callable[[], Any]) -> int:
    _forget_the_past()
    before, of_files = _status_bytes("VmRSS"), _status_bytes("RssFile")
    call()
    read_in = max(
        0, _status_bytes("RssFile") - of_files
    )  # fewer pages than before: the kernel took some back
    return max(0, _status_bytes("VmHWM") - before - read_in)


def _forget_the_past() -> bool:
    """Hand freed memory back, or the call would reuse it unseen; then let the high-water mark start from here."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError, TypeError):
        return False
    return True


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {field}")
