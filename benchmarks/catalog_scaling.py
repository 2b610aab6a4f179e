"""How cost grows with the catalog: tokenizing, and a training step with its table of ``items x dim``.

    python -m benchmarks.catalog_scaling tokenize 1M --output runs/scaling --vectors runs/1M/vectors.npy
    python -m benchmarks.catalog_scaling step 1M --output runs/scaling --model h2rec
    python -m benchmarks.catalog_scaling report --output runs/scaling

Each call measures one size and leaves a JSON file in the output folder; ``report`` makes a table and a plot of all
that are there. Tokenizing is k-means of two levels (two passes each, and what leads up to them) and the codes of all
items. Steps are those of `h2rec.training`, of batches that all have 256 sequences of 20 items, with random codes.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import polars as pl
import torch
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure

from h2rec import SemanticIds
from h2rec._files import replacing
from h2rec.data import InteractionLog, ItemCatalog, Split, leave_one_out
from h2rec.models import build_model
from h2rec.tokenizers import RQKMeans, open_vectors
from h2rec.training import TrainConfig
from h2rec.training.files import write_json
from h2rec.training.module import Recommender
from h2rec.training.progress import quiet_lightning
from h2rec.training.related_items import RelatedItems

from ._machine import describe_machine
from .generated_catalog import Popularity, count, sequence_pieces

_USERS = 100_000
_LENGTH = 20
_WARM_UP = 3


def tokenizing(num_items: int, vectors: Path) -> dict[str, Any]:
    """Seconds to learn two codebooks from a file of so many vectors, and to encode it."""
    source = open_vectors(vectors)
    if len(source) != num_items:
        raise ValueError(f"{vectors}: expected {num_items} rows, got {len(source)}")
    tokenizer = RQKMeans(2, 256, num_iters=4, mini_batch=True)
    started = time.perf_counter()
    tokenizer.fit(source)
    fitted = time.perf_counter()
    tokenizer.tokenize(source)
    return {"fit": fitted - started, "encode": time.perf_counter() - fitted}


def long_sequences(num_items: int) -> Split:
    users, items = map(np.concatenate, zip(*sequence_pieces(Popularity(num_items), _USERS, 0), strict=True))
    lengths = np.bincount(users)
    keep = lengths >= _LENGTH + 3  # a target each for training, validation and test
    log = InteractionLog(
        pl.Series(np.flatnonzero(keep)),
        ItemCatalog(pl.arange(num_items, eager=True, dtype=pl.Int64)),
        np.cumsum([0, *lengths[keep]]),
        items[keep[users]],
    )
    return leave_one_out(log)


class StepTimes(Callback):
    """Seconds from a batch that is there to parameters that are updated."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)


def steps(num_items: int, model: str, dim: int, number: int) -> dict[str, Any]:
    """Seconds of each of so many steps."""
    config = TrainConfig(interactions="-", sids="-", dim=dim, max_length=_LENGTH, loss="sampled_softmax")
    codes = np.random.default_rng(0).integers(0, 256, (num_items, 4), dtype=np.int32)
    sids = SemanticIds(codes, codebook_sizes=(256,) * 4)
    split = long_sequences(num_items)
    torch.manual_seed(0)
    settings = config.model_settings(model)
    module = Recommender(
        model,
        build_model(model, sids, sparse=True, **settings),
        config,
        split,
        related_items=RelatedItems(sids, split, share) if (share := config.smoothing_of(model)) else None,
    )
    times = StepTimes()
    with quiet_lightning():
        lightning.Trainer(
            accelerator="cpu",
            max_epochs=1,
            limit_train_batches=number + _WARM_UP,
            limit_val_batches=0,
            callbacks=[times],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        ).fit(module)
    return {"model": model, "steps": times.seconds[_WARM_UP:]}


def report(output: Path) -> str:
    """The table of all measurements; writes it, and the plot."""
    found = [json.loads(path.read_text()) for path in output.glob("*.json")]
    found.sort(key=lambda one: (one["kind"], one.get("model", ""), one["items"]))
    lines = ["| what | items | time | per million items |", "|---|---|---|---|"]
    for one in found:
        items = f"{one['items'] / 1e6:g}M"
        if one["kind"] == "step":
            low, median, high = np.quantile(one["steps"], (0.1, 0.5, 0.9)) * 1e3
            lines.append(f"| step, {one['model']} | {items} | {median:.0f} ms [{low:.0f}, {high:.0f}] | |")
            continue
        for part in ("fit", "encode"):
            rate = one[part] / one["items"] * 1e6
            lines.append(f"| tokenize, {part} | {items} | {one[part]:.1f} s | {rate:.2f} s |")
    text = "\n".join(lines) + "\n"
    with replacing(output / "scaling.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    with replacing(output / "scaling.png") as temporary:
        draw(found).savefig(temporary, dpi=130)
    return text


def draw(found: list[dict[str, Any]]) -> Figure:
    """Left: tokenizing, and a straight line through its smallest size. Right: steps, median and 10 to 90 %."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    tokenized = [one for one in found if one["kind"] == "tokenize"]
    sizes = [one["items"] / 1e6 for one in tokenized]
    for color, part in enumerate(("fit", "encode")):
        seconds = [one[part] for one in tokenized]
        left.plot(sizes, seconds, "o", color=f"C{color}", label={"fit": "codebooks", "encode": "codes"}[part])
        if sizes:
            line = [seconds[0] / sizes[0] * size for size in (0, max(sizes))]
            left.plot((0, max(sizes)), line, color=f"C{color}", linewidth=1)
    left.set(title="tokenizing", xlabel="million items", ylabel="seconds", xlim=0, ylim=0)
    for color, model in enumerate(sorted({one["model"] for one in found if one["kind"] == "step"})):
        of_model = [one for one in found if one.get("model") == model]
        sizes = [one["items"] / 1e6 for one in of_model]
        median = np.array([statistics.median(one["steps"]) for one in of_model]) * 1e3
        ends = np.array([np.quantile(one["steps"], (0.1, 0.9)) for one in of_model]).T * 1e3
        right.errorbar(
            sizes, median, np.abs(ends - median), fmt="o-", color=f"C{color}", capsize=3, label=model
        )
    right.set(title="a training step", xlabel="million items", ylabel="ms", xlim=0, ylim=0)
    for axes in (left, right):
        axes.legend(frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("tokenize", "step", "report"))
    parser.add_argument("items", type=count, nargs="?", help="such as 10M")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--vectors", type=Path, help="of so many items, for tokenize")
    parser.add_argument("--model", default="sum")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    if args.what == "report":
        print(report(args.output), end="")
        return
    args.output.mkdir(parents=True, exist_ok=True)
    if args.what == "tokenize":
        measured, name = tokenizing(args.items, args.vectors), f"tokenize.{args.items}"
    else:
        measured = steps(args.items, args.model, args.dim, args.steps)
        name = f"step.{args.model}.{args.items}"
    machine = describe_machine(torch.device("cpu"))
    write_json(
        args.output / f"{name}.json", {"kind": args.what, "items": args.items, "machine": machine, **measured}
    )


if __name__ == "__main__":
    main()
