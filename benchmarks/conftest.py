"""Options, fixtures and the report of `pytest benchmarks`."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ._harness import Call, Comparison, Rate, compare_calls
from ._machine import describe_machine
from ._report import as_json, render_tables, write_json, write_png

SHAPE_NAMES = ("small", "paper", "production")

COMPARISONS = pytest.StashKey[list[Comparison]]()
MACHINE = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shapes",
        default="small,paper",
        help=f"comma-separated, of {', '.join(SHAPE_NAMES)} (default: small,paper)",
    )
    parser.addoption(
        "--vectors", type=Path, help=".npy file of vectors [N, D] to learn codebooks from (default: made up)"
    )
    parser.addoption(
        "--bench-output",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder of the JSON and PNG files (default: benchmarks/results)",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "shapes(small, paper, production): the shapes that a benchmark runs with"
    )
    for name in _shape_names(config):
        if name not in SHAPE_NAMES:
            raise pytest.UsageError(f"--shapes: expected some of {', '.join(SHAPE_NAMES)}, got {name!r}")
    device = _device(config)
    config.stash[COMPARISONS] = []
    config.stash[MACHINE] = describe_machine(device)
    config.option.benchmark_quiet = True  # our table shows the rivals side by side; pytest-benchmark's cannot


def _shape_names(config: pytest.Config) -> list[str]:
    return [name.strip() for name in config.getoption("--shapes").split(",")]


def _device(config: pytest.Config) -> torch.device:
    name = config.getoption("--device")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise pytest.UsageError(f"--device: expected cpu or cuda, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no CUDA device")
    return device


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" not in metafunc.fixturenames:
        return
    by_name = metafunc.definition.get_closest_marker("shapes").kwargs
    shapes = [(name, shape) for name in _shape_names(metafunc.config) for shape in by_name[name]]
    metafunc.parametrize(
        "shape", [shape for _, shape in shapes], ids=[f"{n}-{_shape_id(s)}" for n, s in shapes]
    )


def _shape_id(shape) -> str:
    """(N=7, D=64) -> "N7-D64"."""
    return "-".join(f"{field}{value}" for field, value in shape._asdict().items())


@pytest.fixture
def device(request) -> torch.device:
    return _device(request.config)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def compare(request, device, benchmark) -> Callable[..., Comparison]:
    """compare(calls, baseline=..., agree=..., rate=None, memory=False): see _harness.compare_calls.

    Operator and case are read off the names of file and function: bench_<operator>.py::bench_<case>[<shape>].
    The last column is the one that pytest-benchmark records, for --benchmark-json, -autosave and -compare.
    """

    def run(
        calls: Mapping[str, Call],
        *,
        baseline: str,
        agree: Callable[[Any, Any], None],
        rate: Rate | None = None,
        memory: bool | Callable[[Call, torch.device], int | None] = False,
    ) -> Comparison:
        comparison = compare_calls(
            calls,
            baseline=baseline,
            agree=agree,
            operator=request.path.stem.removeprefix("bench_"),
            case=request.function.__name__.removeprefix("bench_"),
            shape=request.node.callspec.id if hasattr(request.node, "callspec") else "",
            device=device,
            rate=rate,
            memory=memory,
        )
        request.config.stash[COMPARISONS].append(comparison)
        _record(benchmark, comparison)
        return comparison

    return run


def _record(benchmark, comparison: Comparison) -> None:
    """pytest-benchmark times one callable at a time; what was timed in turns is handed to it as it is."""
    last = comparison.columns[-1]
    benchmark._mode = "compare"
    benchmark.extra_info |= {
        "column": last.name,
        "baseline": comparison.baseline,
        "ratio": comparison.ratio(last.name).of_medians,
    }
    stats = benchmark._make_stats(iterations=1)
    for seconds in last.seconds:
        stats.update(seconds)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    comparisons = config.stash[COMPARISONS]
    if not comparisons:
        return
    machine = config.stash[MACHINE]
    terminalreporter.section("benchmarks")
    terminalreporter.write_line(render_tables(comparisons, terminalreporter._tw.fullwidth))

    name = f"{_device(config).type}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = config.getoption("--bench-output")
    folder.mkdir(parents=True, exist_ok=True)
    numbers, picture = folder / f"{name}.json", folder / f"{name}.png"
    write_json(numbers, as_json(comparisons, machine))
    processor = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    caption = f"{processor}, torch {machine['versions']['torch']}"
    write_png(picture, comparisons, caption)
    terminalreporter.write_line(caption)
    terminalreporter.write_line(f"written: {numbers}, {picture}")
