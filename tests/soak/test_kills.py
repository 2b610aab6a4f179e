"""SIGKILL at random moments: the next start goes on, and ends as if nothing had happened."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import polars as pl
import pytest
import safetensors.torch
import torch

from h2rec import SemanticIds

PROGRAM = [sys.executable, "-c", "from h2rec.cli import main; main()"]
# What starts, or goes on with, the work in a folder; None when all of it is there.
Command = Callable[[Path], list[object] | None]

NUM_VECTORS, NUM_ITEMS, NUM_USERS = 10_000, 200, 400


def start(arguments: list[object]) -> subprocess.Popen:
    return subprocess.Popen(
        [*PROGRAM, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(arguments: list[object]) -> float:
    """Runs to the end; how many seconds it took."""
    started = time.monotonic()
    child = start(arguments)
    output, _ = child.communicate(timeout=600)
    assert child.returncode == 0, output
    return time.monotonic() - started


def state_of(folder: Path) -> set[tuple[str, int]]:
    """Differs from what it was before when a file has come, gone or changed."""
    names = [os.path.join(path, name) for path, _, names in os.walk(folder) for name in names]
    return {(name, os.stat(name).st_mtime_ns) for name in names if os.path.exists(name)}


def ranks_of(child: subprocess.Popen) -> list[int]:
    """Ids of the processes that train together, if ``child`` has started some."""
    children = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def kill(child: subprocess.Popen, folder: Path, rng: random.Random, earliest: float, latest: float) -> bool:
    """Kills at some moment, or at some change of what is in the folder; False if it was faster."""
    deadline = time.monotonic() + rng.uniform(earliest, latest)
    changes = rng.choice([0, rng.randint(1, 20)])
    seen = state_of(folder)
    while child.poll() is None and time.monotonic() < deadline:
        if changes and (now := state_of(folder)) != seen:
            seen, changes = now, changes - 1
            if changes == 0:
                break
        time.sleep(0.0005)
    if child.poll() is None:
        os.kill(rng.choice([child.pid, *ranks_of(child)]), signal.SIGKILL)
    # Ends when the last of its processes does: none may wait for one that is dead.
    output, _ = child.communicate(timeout=60)
    assert child.returncode in (0, -signal.SIGKILL) or "terminated with signal SIGKILL" in output, output
    return child.returncode != 0


def check_whole(folder: Path) -> None:
    """Every file can be read, but for those that are about to be written."""
    readers = {
        ".safetensors": safetensors.torch.load_file,
        ".ckpt": lambda path: torch.load(path, weights_only=True),
        ".json": lambda path: json.loads(path.read_text()),
        ".csv": lambda path: list(csv.reader(path.read_text().splitlines())),
        ".parquet": pl.read_parquet,
        ".npz": lambda path: dict(np.load(path, allow_pickle=False)),
        ".html": lambda path: (
            path.read_text().rstrip().endswith("</html>") or pytest.fail(f"{path}: cut off")
        ),
        ".pt2": torch.export.load,
        ".faiss": lambda path: faiss.read_index(str(path)),
    }
    for path in folder.rglob("*"):
        if path.suffix in readers and ".partial" not in str(path.relative_to(folder)):
            readers[path.suffix](path)


@pytest.fixture(scope="module")
def start_up() -> float:
    """Seconds until a command begins to work."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import h2rec.training, h2rec.tokenizers, h2rec.cli"], check=True)
    return time.monotonic() - started


def kill_again_and_again(command: Command, folder: Path, kills: int, start_up: float) -> None:
    """Leaves two finished works: undisturbed in ``folder / "0"``, and the last of the killed ones in the last."""
    seconds = finish(command(folder / "0"))
    seed = random.randrange(10**6)
    print(f"\n{kills} kills, seed {seed}; undisturbed {seconds:.1f} s, about {start_up:.1f} s of it to start")
    rng, work, killed = random.Random(seed), 1, 0
    while killed < kills:
        if (arguments := command(folder / str(work))) is None:
            work += 1
        elif kill(start(arguments), folder / str(work), rng, 0.7 * start_up, seconds):
            killed += 1
            check_whole(folder / str(work))
    while (arguments := command(folder / str(work))) is not None:
        finish(arguments)
    print(f"{killed} times killed, {work} times finished")


@pytest.fixture(scope="module")
def vectors(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vectors") / "x.npy"
    np.save(path, np.random.default_rng(0).standard_normal((NUM_VECTORS, 32), dtype=np.float32))
    return path


@pytest.mark.parametrize(("method", "kills"), [("rq-kmeans", 9), ("rq-vae", 6)])
def test_tokenize(method, kills, vectors, tmp_path, start_up):
    def command(folder: Path) -> list[object] | None:
        output, report = folder / "sids.safetensors", folder / "quality.json"
        if output.exists() and report.exists():
            return None
        sizes = ("--levels", 3, "--codebook-size", 64, "--iterations", 30 if method == "rq-kmeans" else 4)
        options = ("--embeddings", vectors, "--method", method, "--report", report)
        return ["tokenize", *options, *sizes, "-o", output]

    kill_again_and_again(command, tmp_path, kills, start_up)
    undisturbed, *others = (SemanticIds.load(folder / "sids.safetensors") for folder in tmp_path.iterdir())
    assert others
    for sids in others:
        assert sids == undisturbed


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    """Users walk through the catalog."""
    folder = tmp_path_factory.mktemp("log")
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 15, NUM_USERS)
    users = np.repeat(np.arange(NUM_USERS), lengths)
    steps = np.concatenate([np.arange(length) for length in lengths])
    starts = rng.integers(0, NUM_ITEMS, NUM_USERS)
    frame = {"user_id": users, "item_id": (starts[users] + steps) % NUM_ITEMS, "timestamp": steps}
    pl.DataFrame(frame).write_parquet(folder / "log.parquet")
    codes = torch.from_numpy(rng.integers(0, 16, (NUM_ITEMS, 3)))
    SemanticIds(codes, codebook_sizes=(16, 16, 16)).save(folder / "sids.safetensors")
    return folder


@pytest.mark.parametrize(("devices", "kills"), [(1, 12), (2, 6)])
def test_train(devices, kills, log, tmp_path, start_up):
    def command(folder: Path) -> list[object] | None:
        if (folder / "report.html").exists():
            return None
        if (folder / "config.json").exists():
            return ["train", "-o", folder, "--resume"]
        files = ("--interactions", log / "log.parquet", "--sids", log / "sids.safetensors")
        size = ("--dim", 16, "--layers", 1, "--batch-size", 32, "--epochs", 15, "--patience", 15)
        return ["train", *files, *size, "--models", "sum,h2rec", "--devices", devices, "-o", folder]

    kill_again_and_again(command, tmp_path, kills, start_up)
    undisturbed, *others = (result(folder) for folder in sorted(tmp_path.iterdir()))
    assert others
    for metrics, weights in others:
        assert metrics == undisturbed[0]
        torch.testing.assert_close(weights, undisturbed[1], rtol=0, atol=0)


def result(run: Path) -> tuple[dict, list[dict]]:
    """Metrics without times, and the weights of the best and the last epoch."""
    metrics = json.loads((run / "metrics.json").read_text())
    for model in metrics["models"].values():
        del model["seconds"]
    checkpoints = sorted(run.glob("*/checkpoints/*.ckpt"))
    return metrics, [torch.load(path, weights_only=True)["state_dict"] for path in checkpoints]


@pytest.fixture(scope="module")
def run(log, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    files = ("--interactions", log / "log.parquet", "--sids", log / "sids.safetensors")
    size = ("--dim", 16, "--layers", 1, "--epochs", 1, "--models", "sum,h2rec")
    finish(["train", *files, *size, "-o", folder])
    return folder


@pytest.mark.parametrize(("earlier", "kills"), [(False, 4), (True, 4)], ids=["new", "in place of another"])
def test_export(earlier, kills, run, tmp_path, start_up):
    """The folder is not there until it is whole; an earlier one stays until then, and is put back by the next start."""
    before, work = tmp_path / "before", tmp_path / "work"
    finish(["export", run, before, "--model", "sum", "--faiss"])
    names = sorted(os.listdir(before))

    def command(folder: Path) -> list[object] | None:
        out = folder / "out"
        if earlier and not folder.exists():
            shutil.copytree(before, out)
        if out.exists():
            assert sorted(os.listdir(out)) == names
            if json.loads((out / "export.json").read_text())["model"] == "h2rec":
                return None
        assert out.exists() or (folder / ".out.old").exists() or not earlier
        return ["export", run, out, "--model", "h2rec", "--faiss", "--force"]

    kill_again_and_again(command, work, kills, start_up)
    undisturbed, *others = sorted(work.iterdir(), key=lambda folder: int(folder.name))
    assert others
    expected = served(undisturbed / "out")
    for folder in others:
        assert set(os.listdir(folder)) <= {"out", ".out.old"}  # the latter until the next export
        for ours, theirs in zip(served(folder / "out"), expected, strict=True):
            assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def served(out: Path) -> tuple[object, ...]:
    """What an export holds, and what its encoder and its index give."""
    items = safetensors.torch.load_file(out / "items.safetensors")["items"]
    users = torch.export.load(out / "user_encoder.pt2").module()(
        torch.arange(12).view(3, 4), torch.tensor([4, 1, 2])
    )
    scores, found = faiss.read_index(str(out / "items.faiss")).search(items[:20].numpy(), 10)
    tables = ((out / name).read_bytes() for name in ("export.json", "sids.parquet"))
    sids = SemanticIds.load(out / "sids.safetensors")
    return items, users, torch.from_numpy(scores), torch.from_numpy(found), sids, *tables
