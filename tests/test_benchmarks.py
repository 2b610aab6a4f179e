"""The harness of `pytest benchmarks`: what it refuses, what it computes, what it writes."""

import dataclasses
import importlib.util
import json
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from h2rec.ops import _backends

ROOT = Path(__file__).parents[1]


def _load(name):
    """A module of benchmarks/, which is no installed package."""
    if "benchmarks" not in sys.modules:
        folder = ROOT / "benchmarks"
        spec = importlib.util.spec_from_file_location(
            "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["benchmarks"])
    return importlib.import_module(f"benchmarks.{name}")


harness, memory, report, eager, columns_module = map(
    _load, ("_harness", "_memory", "_report", "eager", "_columns")
)


class FakeMachine:
    """A clock that moves only when one of its calls runs, by that call's next duration."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def clock(self):
        return self.now

    def call(self, name, durations, result=None):
        durations = iter(durations)

        def run():
            self.log.append(name)
            self.now += next(durations)
            return result

        return run


def forever(duration):
    while True:
        yield duration


def accept(result, expected):
    pass


def compare(calls, **options):
    options = {"baseline": next(iter(calls)), "agree": accept} | options
    return harness.compare_calls(
        calls, operator="op", case="case", shape="small-N7", device=torch.device("cpu"), **options
    )


def column(name, seconds):
    return harness.Column(name, tuple(seconds), 1)


def comparison(columns, **fields):
    return harness.Comparison("op", "case", "small-N7", "cpu", columns[0].name, tuple(columns), **fields)


def test_disagreement_fails_before_anything_is_timed():
    calls = {"eager": lambda: torch.zeros(3), "ours": lambda: torch.ones(3)}

    def clock():
        pytest.fail("timed")

    with pytest.raises(
        harness.Disagreement, match=r"ours is not timed, its result fails the check: .*not close"
    ):
        compare(calls, agree=torch.testing.assert_close, clock=clock)


def test_the_baseline_is_checked_too():
    calls = {"eager": lambda: -1, "ours": lambda: 1}

    def positive(result, _):
        assert result > 0

    with pytest.raises(harness.Disagreement, match="eager is not timed"):
        compare(calls, agree=positive)


def test_unknown_baseline():
    with pytest.raises(ValueError, match=r"baseline: expected one of \['ours'\], got 'eager'"):
        compare({"ours": lambda: 1}, baseline="eager")


def test_rivals_take_turns():
    machine = FakeMachine()
    calls = {name: machine.call(name, forever(0.5)) for name in ("a", "b", "c")}
    result = compare(calls, clock=machine.clock)
    rounds = len(result.columns[0].seconds)
    assert harness.MIN_ROUNDS <= rounds <= harness.MAX_ROUNDS
    assert machine.log[-3 * rounds :] == ["a", "b", "c"] * rounds


def test_slow_calls_get_the_fewest_rounds_and_quick_ones_the_most():
    for duration, rounds in ((60.0, harness.MIN_ROUNDS), (0.01, harness.MAX_ROUNDS)):
        machine = FakeMachine()
        result = compare({"a": machine.call("a", forever(duration))}, clock=machine.clock)
        assert len(result.columns[0].seconds) == rounds


def test_quick_calls_are_repeated_until_a_measurement_is_long_enough():
    machine = FakeMachine()
    calls = {"quick": machine.call("quick", forever(1e-5)), "slow": machine.call("slow", forever(0.1))}
    quick, slow = compare(calls, clock=machine.clock).columns
    assert quick.loops * 1e-5 >= harness.MIN_MEASUREMENT_SECONDS
    assert quick.loops * 1e-5 < 3 * harness.MIN_MEASUREMENT_SECONDS
    assert slow.loops == 1
    assert quick.median == pytest.approx(1e-5)
    assert slow.median == pytest.approx(0.1)


def test_the_gpu_is_waited_for_around_every_measurement():
    machine = FakeMachine()
    call = machine.call("call", forever(1.0))
    harness.time_interleaved({"a": call}, clock=machine.clock, synchronise=lambda: machine.log.append("wait"))
    assert machine.log == ["wait", "call", "wait"] * (len(machine.log) // 3)


def test_ratio_of_medians_and_range_of_the_rounds_ratios():
    result = comparison([column("eager", [4.0, 6.0, 8.0]), column("ours", [2.0, 1.0, 8.0])])
    assert result.ratio("ours") == harness.Ratio(of_medians=3.0, lowest=1.0, highest=6.0)
    assert result.ratio("eager") == harness.Ratio(1.0, 1.0, 1.0)


def test_share_of_the_yardstick():
    rate = harness.Rate("FLOP", 100.0, "mm", lambda: None, 300.0)
    result = comparison([column("ours", [2.0])], rate=rate, yardstick=column("mm", [1.5]))
    assert result.work_per_second("ours") == 50.0
    assert result.share_of_yardstick("ours") == 0.25


def test_the_yardstick_is_timed_in_the_same_rounds_and_is_no_column():
    machine = FakeMachine()
    rate = harness.Rate("B", 1.0, "copy", machine.call("copy", forever(1.0)), 4.0)
    result = compare({"a": machine.call("a", forever(1.0))}, rate=rate, clock=machine.clock)
    assert [c.name for c in result.columns] == ["a"]
    assert result.share_of_yardstick("a") == 0.25
    assert machine.log[-4:] == ["a", "copy"] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process its peak memory")
def test_peak_memory_counts_what_is_freed_within_the_call():
    size = (
        31 * 2**20
    )  # far above what the kernel moves by itself, below what glibc always gives back when freed

    def use_and_free():
        torch.ones(size, dtype=torch.uint8).add_(1)

    use_and_free()  # from now on glibc keeps freed memory of this size for the next call
    result = compare({"ours": use_and_free, "nothing": lambda: None}, memory=True)
    assert result.column("ours").peak_bytes == pytest.approx(size, rel=0.05)
    assert result.column("nothing").peak_bytes < 0.05 * size


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process its peak memory")
def test_peak_memory_counts_no_page_of_a_file(tmp_path):
    size = 8 * 2**20
    (tmp_path / "code").write_bytes(bytes(size))
    with (tmp_path / "code").open("rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as pages:
        peak = memory.peak_extra_bytes(lambda: sum(pages[::4096]), torch.device("cpu"))
    assert peak < 0.05 * size


@pytest.mark.parametrize(("files_after", "extra"), [(50, 30), (70, 10), (20, 30)])
def test_peak_memory_counts_no_page_that_the_kernel_takes_back_or_reads_in(files_after, extra, monkeypatch):
    told = {
        "VmRSS": [100] * 3,
        "RssFile": [50, files_after] * 3,
        "VmHWM": [130, 130, 999],
    }  # once it did both
    monkeypatch.setattr(memory, "_forget_the_past", lambda: True)
    monkeypatch.setattr(memory, "_status_bytes", lambda field: told[field].pop(0))
    assert memory.peak_extra_bytes(lambda: None, torch.device("cpu")) == extra


def test_json_holds_every_measurement():
    rate = harness.Rate("FLOP", 100.0, "mm", lambda: None, 300.0)
    columns = [column("eager", [4.0, 6.0, 8.0]), column("ours", [2.0, 1.0, 8.0])]
    content = report.as_json([comparison(columns, rate=rate, yardstick=column("mm", [1.5]))], {"cpu": "fast"})
    (entry,) = json.loads(json.dumps(content))["comparisons"]
    assert entry["baseline"] == "eager"
    assert entry["rate"]["yardstick_per_s"] == 200.0
    ours = entry["columns"][1]
    assert ours["seconds"] == [2.0, 1.0, 8.0]
    assert (ours["ratio"], ours["ratio_min"], ours["ratio_max"]) == (3.0, 1.0, 6.0)
    assert (ours["median_s"], ours["min_s"], ours["max_s"]) == (2.0, 1.0, 8.0)
    assert ours["peak_extra_bytes"] is None


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    report.write_json(path, {"a": 1})
    write_text = Path.write_text

    def write_half(self, text):
        write_text(self, text[: len(text) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="no space left"):
        report.write_json(path, {"b": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


@pytest.fixture
def some_comparisons():
    quick = comparison([column("eager", [4e-6] * 3), column("ours[cpp]", [2e-6, 1e-6, 8e-6])])
    rate = harness.Rate("FLOP", 1e6, "mm", lambda: None, 3e9)
    slow = harness.Comparison(
        "another", "case", "paper-N9", "cpu", "eager", (column("eager", [2.5]),), rate, column("mm", [0.5])
    )
    return [quick, slow]


def test_work_of_others_is_the_machines_less_our_own(monkeypatch):
    disturbance = _load("_disturbance")
    monkeypatch.setattr(disturbance, "_busy_seconds", iter([100.0, 104.0]).__next__)
    monkeypatch.setattr(disturbance.time, "process_time", iter([10.0, 11.0]).__next__)
    monkeypatch.setattr(disturbance.time, "perf_counter", iter([50.0, 52.0]).__next__)
    assert disturbance.Disturbance().cpus() == 1.5


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what all processes do")
def test_busy_time_of_the_machine_includes_our_own():
    busy_seconds = _load("_disturbance")._busy_seconds
    before, end = busy_seconds(), time.process_time() + 0.5
    while time.process_time() < end:
        pass
    assert busy_seconds() - before > 0.45


def test_disturbed_comparisons_are_listed(some_comparisons):
    quick, slow = some_comparisons
    disturbed = dataclasses.replace(quick, others_cpus=0.75)
    text = report.render_tables([disturbed, dataclasses.replace(slow, others_cpus=0.01)], 80)
    assert text.endswith("others worked on this machine during\n  op case small-N7: 0.8 processors")
    assert "DISTURBED" not in report.render_tables(some_comparisons, 80)


def test_table_marks_the_baseline_and_cuts_nothing(some_comparisons):
    text = report.render_tables(some_comparisons, width=20)
    for expected in (
        "op",
        "another",
        "eager *",
        "ours[cpp] ",
        "4 us",
        "2.00",
        "0.50..4.00",
        "2.5 s",
        "400 kFLOP/s, 0%",
        "6 GFLOP/s",
    ):
        assert expected in text
    assert "ours[cpp] *" not in text


def test_png(some_comparisons, tmp_path):
    path = tmp_path / "ratios.png"
    report.write_png(path, some_comparisons, "a machine")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_eager_rivals_mean_what_the_operators_mean():
    """By hand, on numbers that are exact."""
    x = torch.tensor([[3.0, 1.0], [0.0, 0.0]])
    codebooks = torch.tensor([[[0.0, 0.0], [2.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]]])
    quantized, codes = eager.residual_quantize(x, codebooks)
    assert codes.tolist() == [[1, 0], [0, 1]]
    assert quantized.tolist() == [[3.0, 1.0], [0.0, 0.0]]

    ids, table = torch.tensor([1, 0]), torch.tensor([[7.0, 7.0], [8.0, 8.0]])
    expected = [[[1.0, 1.0], [3.0, 1.0]], [[8.0, 8.0], [7.0, 7.0]]]
    item_codes = torch.tensor([[1, 0], [0, 0]])
    by_level = eager.harmonized_embedding(ids, item_codes, codebooks.unbind(), table)
    assert [t.tolist() for t in by_level] == expected
    bag = eager.harmonized_embedding_bag(
        ids, item_codes + torch.tensor([0, 2]), codebooks.flatten(0, 1), table
    )
    assert [t.tolist() for t in bag] == expected

    one_item = eager.alignment_loss(x[:1], x[:1], ids[:1], item_codes[:1], 2, 0.1)
    assert one_item.item() == 0.0
    orthogonal = torch.eye(2)
    two_items = eager.alignment_loss(orthogonal, orthogonal, ids, item_codes, 2, 0.5)
    assert two_items.item() == pytest.approx(torch.tensor(1 + torch.e**-2).log().item())
    alike = eager.alignment_loss(orthogonal, orthogonal, ids, item_codes, 1, 0.5)
    assert alike.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("usable", "expected"),
    [
        (["reference"], {"h2rec": None}),
        (["cpp", "reference"], {"h2rec[cpp]": "cpp", "h2rec[reference]": "reference", "h2rec": None}),
    ],
)
def test_backends_that_can_serve_are_columns(usable, expected, monkeypatch):
    monkeypatch.delenv("H2REC_BACKEND", raising=False)
    monkeypatch.setattr(_backends, "usable", lambda operator, device_type: usable)
    columns = columns_module.h2rec_columns("alignment_loss", lambda: _backends._requested, "cpu")
    assert {name: call() for name, call in columns.items()} == expected
    assert list(columns)[-1] == "h2rec"


def run_benchmarks(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "-q", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_small_run_from_the_command_line(tmp_path):
    ours = tmp_path / "pytest-benchmark.json"
    done = run_benchmarks(
        "-k",
        "bench_inference",
        "--shapes",
        "small",
        "--bench-output",
        tmp_path / "out",
        "--benchmark-json",
        ours,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "harmonized_embedding" in done.stdout
    (written,) = (tmp_path / "out").glob("*.json")
    content = json.loads(written.read_text())
    assert content["machine"]["threads"] == 1
    assert content["machine"]["versions"]["torch"] == torch.__version__
    (entry,) = content["comparisons"]
    assert (entry["operator"], entry["case"]) == ("harmonized_embedding", "inference")
    assert entry["shape"].startswith("small-")
    assert entry["columns"][-1]["name"] == "h2rec"
    assert written.with_suffix(".png").exists()

    (recorded,) = json.loads(ours.read_text())["benchmarks"]
    assert recorded["extra_info"]["column"] == "h2rec"
    assert recorded["stats"]["median"] == pytest.approx(entry["columns"][-1]["median_s"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "huge"], "--shapes: expected some of small, paper, production, got 'huge'"),
        (["--device", "abacus"], "--device: expected cpu or cuda, got 'abacus'"),
    ],
)
def test_unknown_options(arguments, message):
    done = run_benchmarks("--collect-only", *arguments)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert message in done.stderr
