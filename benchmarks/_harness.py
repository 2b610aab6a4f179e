"""Rivals timed in turns: agreement first, then A B A B ..., so that a change of the machine's mood meets all alike."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ._disturbance import Disturbance
from ._memory import peak_extra_bytes

MIN_MEASUREMENT_SECONDS = 5e-3  # a measurement repeats its call until it is at least this long
WARM_UP_SECONDS = 0.1
BUDGET_SECONDS = 8.0  # what the rounds of one comparison may take together, within the limits below
MIN_ROUNDS, MAX_ROUNDS = 5, 31

Call = Callable[[], Any]


@dataclass(frozen=True)
class Rate:
    """Work done by one call, and a yardstick: a call that shows what the machine can do, timed in the same rounds."""

    unit: str  # "FLOP" or "B"
    per_call: float
    yardstick: str
    yardstick_call: Call
    yardstick_per_call: float


@dataclass(frozen=True)
class Ratio:
    """Baseline's time over a column's time (above 1: the column is faster)."""

    of_medians: float
    lowest: float  # of the ratios of the two measurements of one round
    highest: float


@dataclass(frozen=True)
class Column:
    name: str
    seconds: tuple[float, ...]  # of one call, a value per round
    loops: int  # calls per measurement
    peak_bytes: int | None = None  # above what was in memory before the call; None: not measured

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Comparison:
    operator: str
    case: str
    shape: str
    device: str
    baseline: str
    columns: tuple[Column, ...]
    rate: Rate | None = None
    yardstick: Column | None = None
    others_cpus: float | None = None  # processors that other processes kept busy meanwhile; None: not known

    def column(self, name: str) -> Column:
        return next(column for column in self.columns if column.name == name)

    def ratio(self, name: str) -> Ratio:
        base, column = self.column(self.baseline), self.column(name)
        pairs = [b / c for b, c in zip(base.seconds, column.seconds, strict=True)]
        return Ratio(base.median / column.median, min(pairs), max(pairs))

    def work_per_second(self, name: str) -> float | None:
        return self.rate.per_call / self.column(name).median if self.rate else None

    def share_of_yardstick(self, name: str) -> float | None:
        """Rate of a column over the rate of the yardstick in the same run."""
        if self.rate is None or self.yardstick is None:
            return None
        return self.work_per_second(name) / (self.rate.yardstick_per_call / self.yardstick.median)


class Disagreement(AssertionError):
    """Two columns do not compute the same thing, so that their times mean nothing."""


def check_agreement(calls: Mapping[str, Call], baseline: str, agree: Callable[[Any, Any], None]) -> None:
    """`agree(result, expected)` for every column, the baseline included; it raises AssertionError where they differ."""
    expected = calls[baseline]()
    for name, call in calls.items():
        result = expected if name == baseline else call()
        try:
            agree(result, expected)
        except AssertionError as error:
            raise Disagreement(f"{name} is not timed, its result fails the check: {error}") from error


def time_interleaved(
    calls: Mapping[str, Call],
    *,
    clock: Callable[[], float] = time.perf_counter,
    synchronise: Callable[[], None] = lambda: None,
) -> list[Column]:
    """One measurement of every call per round, in the order of `calls`."""

    def measure(call: Call, loops: int) -> float:
        synchronise()
        start = clock()
        for _ in range(loops):
            call()
        synchronise()
        return clock() - start

    def calibrate(call: Call) -> tuple[int, float]:
        warm_until = clock() + WARM_UP_SECONDS
        while True:
            elapsed = measure(call, 1)
            if clock() >= warm_until:
                break
        loops = 1
        while elapsed < MIN_MEASUREMENT_SECONDS:
            # At most hundredfold at once: one mistimed call must not ask for millions of them.
            growth = min(100.0, 1.2 * MIN_MEASUREMENT_SECONDS / max(elapsed, 1e-9))
            loops = max(loops + 1, math.ceil(loops * growth))
            elapsed = measure(call, loops)
        return loops, elapsed

    gc.collect()
    gc.disable()
    try:
        calibrated = {name: calibrate(call) for name, call in calls.items()}
        one_round = sum(elapsed for _, elapsed in calibrated.values())
        rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(BUDGET_SECONDS / one_round)))
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                loops = calibrated[name][0]
                seconds[name].append(measure(call, loops) / loops)
    finally:
        gc.enable()
    return [Column(name, tuple(values), calibrated[name][0]) for name, values in seconds.items()]


def compare_calls(
    calls: Mapping[str, Call],
    *,
    baseline: str,
    agree: Callable[[Any, Any], None],
    operator: str,
    case: str,
    shape: str,
    device: torch.device,
    rate: Rate | None = None,
    memory: bool | Callable[[Call, torch.device], int | None] = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Check that the columns agree, time them in turns and, if asked, measure the peak memory of a call of each.

    `memory` may be the measure; True is `peak_extra_bytes`.

    Raises ValueError when `baseline` is not among `calls`, and Disagreement, with nothing timed, when a check fails.
    """
    if baseline not in calls:
        raise ValueError(f"baseline: expected one of {list(calls)}, got {baseline!r}")
    check_agreement(calls, baseline, agree)

    timed = dict(calls)
    if rate is not None:
        timed[rate.yardstick] = rate.yardstick_call
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    disturbance = Disturbance()
    columns = time_interleaved(timed, clock=clock, synchronise=synchronise)
    others_cpus = disturbance.cpus()
    yardstick = columns.pop() if rate is not None else None
    if memory:
        peak = peak_extra_bytes if memory is True else memory
        columns = [Column(c.name, c.seconds, c.loops, peak(calls[c.name], device)) for c in columns]
    return Comparison(
        operator, case, shape, str(device), baseline, tuple(columns), rate, yardstick, others_cpus
    )
