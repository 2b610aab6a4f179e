"""Several processes, started by us and by torchrun: they train what one does, and none waits for a dead one."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from h2rec import SemanticIds

H2REC = ["-c", "from h2rec.cli import main; main()"]
NUM_ITEMS, NUM_USERS, USERS_PER_STEP = 60, 84, 32  # the last step of an epoch has 20 users
SECONDS = 60  # in which all must have noticed that one is dead


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[object]:
    """Of `h2rec train`, without what each process draws for itself: dropout, and items of a target's kind."""
    folder = tmp_path_factory.mktemp("log")
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(NUM_USERS), rng.integers(4, 15, NUM_USERS))
    steps = np.arange(len(users)) - np.searchsorted(users, users)
    items = (rng.integers(0, NUM_ITEMS, NUM_USERS)[users] + steps) % NUM_ITEMS
    pl.DataFrame({"user_id": users, "item_id": items, "timestamp": steps}).write_parquet(
        folder / "log.parquet"
    )
    codes = torch.from_numpy(rng.integers(0, 8, (NUM_ITEMS, 3)))
    SemanticIds(codes, codebook_sizes=(8, 8, 8)).save(folder / "sids.safetensors")
    files = ("--interactions", folder / "log.parquet", "--sids", folder / "sids.safetensors")
    weights = ("--dropout", 0, "--alignment-weight", 0, "--granularity-weight", 0, "--target-smoothing", 0)
    size = ("--dim", 8, "--layers", 1, "--epochs", 4, "--models", "sum,h2rec")
    return [*files, *weights, *size, "--accelerator", "cpu", "--ranking-negatives", 20]


def train(*arguments: object, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    command = [sys.executable, *launcher, *(() if launcher else H2REC), "train", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def torchrun(count: int) -> tuple[str, ...]:
    program = Path(sys.executable).with_name("h2rec")
    return (
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={count}",
        "--no-python",
        str(program),
    )


def assert_same_run(run: Path, expected: Path) -> None:
    for model in ("sum", "h2rec"):
        ours, theirs = (pl.read_csv(folder / model / "metrics.csv").to_numpy() for folder in (run, expected))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
        ours, theirs = (
            torch.load(folder / model / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
            for folder in (run, expected)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    ours, theirs = (json.loads((folder / "metrics.json").read_text())["models"] for folder in (run, expected))
    for model in ("sum", "h2rec"):
        for stage in ("valid", "test"):
            assert ours[model][stage]["full"]["overall"] == pytest.approx(
                theirs[model][stage]["full"]["overall"]
            )


@pytest.fixture(scope="module")
def one_process(options, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("one") / "run"
    result = train(*options, "--batch-size", USERS_PER_STEP, "-o", run)
    assert result.returncode == 0, result.stderr
    return run


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("launched_by", ["h2rec", "torchrun"])
def test_as_one_process(launched_by, count, options, one_process, tmp_path):
    batch = ("--batch-size", USERS_PER_STEP // count)
    if launched_by == "torchrun":
        result = train(*options, *batch, "-o", tmp_path / "run", launcher=torchrun(count))
    else:
        result = train(*options, *batch, "--devices", count, "-o", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("The report is") == 1
    assert_same_run(tmp_path / "run", one_process)


def test_another_number_of_processes_goes_on(options, one_process, tmp_path):
    run = tmp_path / "run"
    for count in (1, 2, 4, 1):  # killed after the first epochs, but for the last
        resumes = run.exists()
        arguments = (
            ["--resume", "--devices", count] if resumes else [*options, "--batch-size", USERS_PER_STEP]
        )
        command = [sys.executable, *H2REC, "train", *map(str, arguments), "-o", str(run)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        if count != 1 or not resumes:
            next(line for line in child.stdout if ": epoch" in line)
            time.sleep(0.05)
            child.kill()
        child.communicate(timeout=SECONDS)
    assert child.returncode == 0
    assert_same_run(run, one_process)


def test_every_process_hears_of_a_refused_run(options, one_process):
    result = train(*options, "--batch-size", 16, "-o", one_process, launcher=torchrun(2))
    assert result.returncode != 0
    assert "exists already; resume it" in result.stderr


def endless(options: list[object], run: Path) -> list[str]:
    """A run that is not over when one of its processes dies."""
    return [*map(str, options), *("--epochs", "5000", "--patience", "5000"), "-o", str(run)]


def wait_for_training(run: Path) -> None:
    deadline = time.monotonic() + 500
    while not (run / "sum" / "metrics.csv").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_torchrun_ends_when_one_process_is_killed(options, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, *torchrun(4), "train", *endless(options, run)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_training(run)
    workers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    victim = next(pid for pid in workers if b"train" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(int(victim), signal.SIGKILL)
    output, _ = child.communicate(timeout=SECONDS)  # until the last worker has closed it
    assert child.returncode != 0
    assert re.search(r"exitcode\s*: -9", output), output


@pytest.mark.parametrize("victim", [0, 3])
def test_the_others_notice_by_themselves(victim, options, tmp_path):
    """Without a launcher that ends them."""
    run = tmp_path / "run"
    with socket.create_server(("127.0.0.1", 0)) as server:  # a port that is free
        port = str(server.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    command = [sys.executable, *H2REC, "train", *endless(options, run)]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    wait_for_training(run)
    ranks[victim].kill()
    killed = time.monotonic()
    for rank, child in enumerate(ranks):
        _, errors = child.communicate(timeout=max(1.0, SECONDS - (time.monotonic() - killed)))
        assert child.returncode != 0
        if rank != victim:
            assert "another process is gone; resume the run to go on" in errors
    print(f"\nall had ended {time.monotonic() - killed:.1f} s after rank {victim} was killed")
