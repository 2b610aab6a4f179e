"""How well the models rank: every data set x model x seed, trained and tested by `h2rec.training`, in one table.

    python -m benchmarks.quality DATA/beauty DATA/yelp --output runs/quality --seeds 0,1 --set dropout=0.5

A data folder holds ``interactions.parquet`` (``user_id``, ``item_id`` and an order), and ``vectors.npy`` (content
vectors of the items, from which semantic IDs are made) or ``sids.safetensors`` or both. A cell is finished when its
file ``cells/DATA.MODEL.SEED.json`` is there; a run that was killed goes on from the last whole epoch of its cell. The
report is written anew after every cell, from all cells of the output folder.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch

from h2rec import SemanticIds
from h2rec._files import replacing
from h2rec.data import popularity_head
from h2rec.training import TrainConfig, load_model, rank_users, read_split, train_run
from h2rec.training.config import PRESETS
from h2rec.training.evaluation import metrics_by_group
from h2rec.training.files import write_json
from h2rec.training.tiled_ranks import sweep_progress

from ._balance import balance
from ._machine import describe_machine
from ._quality_report import is_complete, write_report

QUANTIZERS = ("rq_kmeans", "rq_vae", "pq")


class Variant(NamedTuple):
    """A line of the table: a model, and what of its settings differs from everybody's."""

    model: str
    settings: Mapping[str, Any] = MappingProxyType({})


BASELINES = {
    **{name: Variant(name) for name in ("hash", "llminit", "semantic", "sum", "mean", "concat")},
    # As wide in the score as the two branches of H2Rec with the default dim, 64, and twice its hash table.
    "sum-128": Variant("sum", {"dim": 128}),
}
ABLATIONS = {
    "h2rec-no-smoothing": Variant("h2rec", {"target_smoothing": 0.0}),
    "h2rec-one-branch": Variant("sum", {"target_smoothing": 0.3}),
    "h2rec-one-backbone": Variant("h2rec", {"share_backbone": True}),
    # Without vectors, the codes say how alike items are in content.
    "h2rec-random-start": Variant("h2rec", {"embeddings": None}),
    "h2rec-attention": Variant("h2rec", {"mixing": "residual_attention"}),
    "h2rec-alignment": Variant("h2rec", {"alignment_weight": 0.1}),
    "h2rec-granularity": Variant("h2rec", {"mixing": "residual_attention", "granularity_weight": 0.1}),
    "h2rec-128": Variant("h2rec", {"dim": 128}),
}
VARIANTS = {
    **BASELINES,
    "h2rec": Variant("h2rec"),
    "paper": Variant("h2rec", {**PRESETS["paper"], "num_negatives": 1}),
    **ABLATIONS,
}
DEFAULT_VARIANTS = ("hash", "semantic", "sum", "sum-128", "h2rec")


class Cell(NamedTuple):
    data: Path
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.data.name}.{self.variant}.{self.seed}"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    cells = [Cell(data, v, seed) for seed in options.seeds for data in options.data for v in options.models]
    folder = options.output / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    missing = [cell for cell in cells if not is_finished(cell, options)]
    print(f"{len(cells)} cells, {len(cells) - len(missing)} of them finished before", flush=True)
    for number, cell in enumerate(missing):
        left = seconds_left(missing[number:], folder)
        print(f"== {cell.name} ({number + 1} of {len(missing)}){time_left(left)}", flush=True)
        run_cell(cell, options)
        write_report(options.output)
    print(f"The report is {write_report(options.output)}", flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("data", type=Path, nargs="+", help="folders of data")
    parser.add_argument("--output", type=Path, required=True, help="folder of the cells and of the report")
    parser.add_argument(
        "--models",
        type=names,
        default=DEFAULT_VARIANTS,
        help=f"of {', '.join(VARIANTS)} (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=numbers, default=(0,), help="for example 0,1 (default: 0)")
    parser.add_argument("--quantizer", choices=QUANTIZERS, default=QUANTIZERS[0], help="default: %(default)s")
    parser.add_argument(
        "--set",
        type=setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        dest="settings",
        help="a setting of h2rec.training.TrainConfig for all models",
    )
    options = parser.parse_args(arguments)
    for data in options.data:
        if not (data / "interactions.parquet").is_file():
            parser.error(f"data: expected a folder with interactions.parquet, got {data}")
    return options


def names(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    for name in chosen:
        if name not in VARIANTS:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(VARIANTS)}, got {name!r}")
    return chosen


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def setting(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator or name not in {field.name for field in dataclasses.fields(TrainConfig)}:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE with a setting of TrainConfig, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def is_finished(cell: Cell, options: argparse.Namespace) -> bool:
    """Whether the cell is there, made with the settings that are asked for."""
    path = options.output / "cells" / f"{cell.name}.json"
    if not path.exists():
        return False
    content = json.loads(path.read_text())
    made = TrainConfig.from_dict(content["config"])
    asked = make_config(cell, options).with_absolute_paths()
    if made.difference(asked):
        sys.exit(
            f"{path} was made with other settings, use another --output: {made.describe_difference(asked)}"
        )
    return is_complete(content)


def run_cell(cell: Cell, options: argparse.Namespace) -> None:
    """Trains and tests one model, and leaves ``DATA.MODEL.SEED.json`` and the test ranks of its users, ``.npz``."""
    run = options.output / "runs" / cell.name
    config = make_config(cell, options).with_absolute_paths()
    metrics = train_run(config, run, resume=(run / "config.json").exists())
    model = VARIANTS[cell.variant].model
    folder = options.output / "cells"
    ranks = np.load(run / model / "ranks.npz")
    on_gpu = config.accelerator != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    trained, _, _, sids = load_model(run, model)
    trained = trained.to(device)
    split = read_split(config, sids.num_items)
    counts = split.train_counts()
    with_history = rank_users(trained, split, "test", users=ranks["users"], mask_history=False).full
    tested = metrics["models"][model]
    tested["test"]["with_history"] = metrics_by_group(with_history, ranks["targets"], counts)
    with replacing(folder / f"{cell.name}.npz") as temporary:
        # Halves of ranks are exact in float32 up to 2^23 items.
        np.savez_compressed(
            temporary,
            users=ranks["users"].astype(np.int32),
            targets=ranks["targets"].astype(np.int32),
            full=ranks["full"].astype(np.float32),
            sampled=ranks["sampled"].astype(np.float32),
            with_history=with_history.astype(np.float32),
            is_head=popularity_head(counts)[ranks["targets"]],
        )
    write_json(
        folder / f"{cell.name}.json",
        {
            "data": cell.data.name,
            "variant": cell.variant,
            "seed": cell.seed,
            "quantizer": options.quantizer,
            **tested,
            "balance": balance(
                trained,
                split,
                ranks["users"],
                mask_history=config.mask_history,
                progress=sweep_progress(cell.name, split.num_items),
            ),
            "sid_stats": metrics["sid_stats"],
            "config": dataclasses.asdict(config),
            "machine": describe_machine(device),
            "finished": time.strftime("%Y-%m-%d %H:%M"),
        },
    )


def make_config(cell: Cell, options: argparse.Namespace) -> TrainConfig:
    vectors = cell.data / "vectors.npy"
    settings = {
        "interactions": str(cell.data / "interactions.parquet"),
        "sids": str(semantic_ids(cell.data, options.output, options.quantizer)),
        "embeddings": str(vectors) if vectors.exists() else None,
        **dict(options.settings),
        **VARIANTS[cell.variant].settings,
        "models": (VARIANTS[cell.variant].model,),
        "seed": cell.seed,
    }
    return TrainConfig.from_dict(settings)


def semantic_ids(data: Path, output: Path, quantizer: str) -> Path:
    """The data folder's own semantic IDs, or those that the quantizer makes of its vectors, made once."""
    given = data / "sids.safetensors"
    if given.exists():
        return given
    made = output / "sids" / f"{data.name}.{quantizer}.safetensors"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        tokenize(np.load(data / "vectors.npy").astype(np.float32), quantizer).save(made)
    return made


def tokenize(vectors: np.ndarray, quantizer: str) -> SemanticIds:
    from h2rec.tokenizers import RQVAE, ProductQuantizer, RQKMeans

    make = {"rq_kmeans": RQKMeans, "rq_vae": lambda: RQVAE(vectors.shape[1]), "pq": ProductQuantizer}
    return make[quantizer]().fit(vectors).tokenize(vectors)


def seconds_left(missing: Sequence[Cell], folder: Path) -> float | None:
    """What the missing cells will take: as long as finished ones of their data and model, or else of their data."""
    finished = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    total = 0.0
    for cell in missing:
        of_data = [c for c in finished if c["data"] == cell.data.name]
        alike = [c["seconds"] for c in of_data if c["variant"] == cell.variant] or [
            c["seconds"] for c in of_data
        ]
        if not alike:
            return None
        total += sum(alike) / len(alike)
    return total


def time_left(seconds: float | None) -> str:
    if seconds is None:
        return ""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f", about {hours} h {minutes} min left" if hours else f", about {minutes} min left"


if __name__ == "__main__":
    sys.exit(main())
