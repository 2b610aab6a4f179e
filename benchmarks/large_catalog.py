"""A large catalog from files to recommendations, by the commands that users call; time and memory of each phase.

    python -m benchmarks.large_catalog runs/10M --items 10M

A phase that is finished is not run again; the table is written to ``phases.md`` in the folder after each one. Memory is
the peak of what was resident, mapped files included, as the kernel counts it. Of training that was killed and goes on,
what is measured is the rest.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from h2rec._files import replacing
from h2rec.training.files import write_json

from .generated_catalog import count

LIMIT = 16 << 30  # bytes resident


def phases(folder: Path, args: argparse.Namespace) -> dict[str, list[str]]:
    """Phase -> the command, in order."""
    vectors, log, sids = (
        folder / name for name in ("vectors.npy", "interactions.parquet", "sids.safetensors")
    )
    h2rec = [sys.executable, "-c", "from h2rec.cli import main; main()"]
    generate = [sys.executable, "-m", "benchmarks.generated_catalog", folder, "--items", args.items]
    tokenize = ["--embeddings", vectors, "--mini-batch", "--iterations", "8", "--output", sids, "--force"]
    epochs = -(-args.steps // args.steps_per_epoch)
    train = ["--interactions", log, "--sids", sids, "--dim", args.dim, "--eval-users", args.eval_users]
    train += ["--epochs", epochs, "--patience", epochs, "--steps-per-epoch", args.steps_per_epoch]
    commands = {
        "generate": [*generate, "--dim", args.dim, "--seed", args.seed],
        "tokenize": [*h2rec, "tokenize", *tokenize, "--seed", args.seed],
    }
    for model in ("sum", "h2rec"):
        run = folder / model
        commands[f"train {model}"] = [*h2rec, "train", *train, "--models", model, "-o", run]
        if (run / "config.json").exists():
            commands[f"train {model}"] = [*h2rec, "train", "-o", run, "--resume"]
        commands[f"evaluate {model}"] = [*h2rec, "evaluate", run]
        commands[f"recommend {model}"] = [*h2rec, "recommend", run, "--user", "0"]
    return {phase: [str(word) for word in command] for phase, command in commands.items()}


def measure(command: list[str]) -> dict[str, float]:
    """Runs a command to its end: seconds by the clock and of the CPU, and its peak of resident bytes.

    (Linux starts a child's peak from what this process has, which is little.)
    """
    started = time.perf_counter()
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "bytes": usage.ru_maxrss * 1024,
    }


def table(measured: dict[str, dict[str, float]]) -> str:
    lines = ["| phase | time | CPU time | peak resident |", "|---|---|---|---|"]
    for phase, one in measured.items():
        times = " | ".join(f"{one[kind]:,.0f} s" for kind in ("seconds", "cpu_seconds"))
        lines.append(f"| {phase} | {times} | {one['bytes'] / 2**30:.1f} GiB |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--items", type=count, default=count("10M"), help="such as 10M")
    parser.add_argument("--dim", type=int, default=64, help="of the vectors and of the tables")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--steps-per-epoch", type=int, default=100)
    parser.add_argument("--eval-users", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    path = args.folder / "phases.json"
    measured = json.loads(path.read_text()) if path.exists() else {}
    for phase, command in phases(args.folder, args).items():
        if phase in measured:
            continue
        print(f"== {phase}", flush=True)
        measured[phase] = measure(command)
        write_json(path, measured)
        with replacing(args.folder / "phases.md") as temporary:
            temporary.write_text(table(measured), encoding="utf-8")
    print(table(measured))
    if too_large := [phase for phase, one in measured.items() if one["bytes"] > LIMIT]:
        sys.exit(f"more than {LIMIT / 2**30:.0f} GiB resident: {', '.join(too_large)}")


if __name__ == "__main__":
    main()
