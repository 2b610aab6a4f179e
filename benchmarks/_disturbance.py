"""Was the machine ours? Other processes' work during a measurement, in processors."""

import os
import time
from pathlib import Path

# Fields of the first line of /proc/stat, in ticks: user nice system idle iowait irq softirq steal.
_IDLE_FIELDS = (3, 4)
_FIELDS = 8  # guest time, which follows, is in user time already


class Disturbance:
    """From construction to `cpus()`."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), _busy_seconds(), time.process_time()

    def cpus(self) -> float | None:
        """Processors that others (or the host, if it lent them elsewhere) kept busy on average; None if unknown."""
        start, busy, own = self._start
        if busy is None:
            return None
        others = _busy_seconds() - busy - (time.process_time() - own)
        return max(0.0, others / (time.perf_counter() - start))


def _busy_seconds() -> float | None:
    """Of all processors together, since boot."""
    try:
        first_line = Path("/proc/stat").read_text().split("\n", 1)[0]
    except OSError:
        return None
    ticks = [int(field) for field in first_line.split()[1:][:_FIELDS]]
    busy = sum(value for i, value in enumerate(ticks) if i not in _IDLE_FIELDS)
    return busy / os.sysconf("SC_CLK_TCK")
