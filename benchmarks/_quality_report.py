"""What the cells of `benchmarks.quality` say together: a table, tests of significance, pictures."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from h2rec._files import replacing
from h2rec.training.evaluation import hits_and_gains

from ._balance import POPULARITY_WEIGHTS

RANKINGS = ("full", "sampled", "with_history")
SLICES = ("overall", "head", "tail")
CHAMPION = "h2rec"
RESAMPLES = 10_000
_CHUNK = 500  # resamples at a time


def write_report(output: Path) -> Path:
    """Writes ``report.md`` and the pictures beside it, from all cells of the folder."""
    from ._quality_plot import draw  # which imports from here

    cells = [json.loads(path.read_text()) for path in sorted((output / "cells").glob("*.json"))]
    complete = [cell for cell in cells if is_complete(cell)]
    left_out = len(cells) - len(complete)
    cells = complete
    parts = [
        "# Quality\n\nTest users; mean over seeds. Full: in the whole catalog, by the rule that training stopped by: "
        "without what the user had before, unless `mask_history` is false. Sampled: against 100 negatives. With "
        "history: in the whole catalog.\n"
    ]
    if left_out:
        parts.append(f"Left out: {left_out} cells that lack a part, until they are asked for again.\n")
    for data in sorted({cell["data"] for cell in cells}):
        of_data = [cell for cell in cells if cell["data"] == data]
        parts.append(
            f"## {data}\n\n{table(of_data)}\n{significance(of_data, output / 'cells')}\n{at_equal_balance(of_data)}"
        )
    path = output / "report.md"
    with replacing(path) as temporary:
        temporary.write_text("\n".join(parts), encoding="utf-8")
    for name, figure in draw(cells).items():
        with replacing(output / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=130)
    return path


def is_complete(cell: dict[str, Any]) -> bool:
    """Whether a cell has every part; one of an older version is made again."""
    return "balance" in cell and all(ranking in cell["test"] for ranking in RANKINGS)


def mean_metric(cells: Sequence[dict[str, Any]], ranking: str, group: str, metric: str = "NDCG@10") -> float:
    """Mean over seeds of a test metric; ``group`` is overall, head, tail or a popularity band."""
    values = []
    for cell in cells:
        groups = cell["test"][ranking]
        values.append((groups["bands"].get(group) or groups[group])[metric])
    return statistics.fmean(values)


def by_variant(cells: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Variant -> its cells; H2Rec last."""
    variants = sorted({cell["variant"] for cell in cells}, key=lambda v: (v == CHAMPION, v))
    return {v: [cell for cell in cells if cell["variant"] == v] for v in variants}


def of_common_seeds(*groups: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The cells of each group with the seeds that all groups have: seeds differ as much as models do."""
    seeds = set.intersection(*({cell["seed"] for cell in group} for group in groups))
    return [[cell for cell in group if cell["seed"] in seeds] for group in groups]


def table(cells: Sequence[dict[str, Any]]) -> str:
    """A line per variant, best full ranking last; NDCG@10 where nothing else is said."""
    head = ("model", "seeds", "full HR@10", *(f"{ranking} {s}" for ranking in RANKINGS for s in SLICES))
    lines = [
        "| " + " | ".join((*head, "valid NDCG@10", "epochs", "s / epoch")) + " |",
        "|---" * (len(head) + 3) + "|",
    ]
    groups = by_variant(cells)
    for variant in sorted(groups, key=lambda v: mean_metric(groups[v], "full", "overall")):
        group = groups[variant]
        numbers = [mean_metric(group, "full", "overall", "HR@10")]
        numbers += [mean_metric(group, ranking, s) for ranking in RANKINGS for s in SLICES]
        valid = statistics.fmean(cell["valid"]["full"]["overall"]["NDCG@10"] for cell in group)
        epochs = statistics.fmean(cell["epochs"] for cell in group)
        seconds = statistics.fmean(cell["seconds"] / cell["epochs"] for cell in group)
        row = [
            variant,
            str(len(group)),
            *(f"{n:.4f}" for n in (*numbers, valid)),
            f"{epochs:.0f}",
            f"{seconds:.0f}",
        ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def significance(cells: Sequence[dict[str, Any]], folder: Path) -> str:
    """H2Rec against every other variant, on each slice, paired over users: difference, interval, p.

    With several seeds a user's value is its mean over those that both have.
    """
    groups = by_variant(cells)
    if CHAMPION not in groups:
        return ""
    if len({cell_ranks(cell, folder)["users"].tobytes() for cell in cells}) > 1:
        return "No significance: with `eval_users` each seed ranks other users.\n"
    head = ("h2rec against", "seeds", *(f"{ranking} {s}" for ranking in RANKINGS for s in SLICES))
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for variant in groups:
        if variant == CHAMPION:
            continue
        pair = of_common_seeds(groups[CHAMPION], groups[variant])
        if not pair[0]:
            continue
        row = [variant, str(len(pair[0]))]
        members = slices_of(pair[0][0], folder).values()
        for ranking in RANKINGS:
            ours, theirs = (user_gains(group, folder, ranking) for group in pair)
            row += [describe(*paired_bootstrap(ours[m], theirs[m])) for m in members]
        lines.append("| " + " | ".join(row) + " |")
    note = f"Relative difference of NDCG@10, 95 % interval, p (two-sided); {RESAMPLES:,} paired resamples of users.\n"
    return "\n".join(lines) + "\n\n" + note


def at_equal_balance(cells: Sequence[dict[str, Any]]) -> str:
    """What H2Rec gains in one of head and tail where the other model is no worse in the other one.

    The other model is made so by popularity in its scores (`benchmarks._balance`); H2Rec stays as it is.
    """
    groups = by_variant(cells)
    if CHAMPION not in groups:
        return ""
    lines = [
        "| h2rec against | seeds | head, where the other's tail is as good | tail, where the other's head is as good |",
        "|---|---|---|---|",
    ]
    for variant in groups:
        ours, theirs = of_common_seeds(groups[CHAMPION], groups[variant])
        if variant == CHAMPION or not ours:
            continue
        head, tail = (mean_metric(ours, "full", group) for group in ("head", "tail"))
        their_head, their_tail = balance_curve(theirs)
        pairs = ((head, best_at(tail, their_tail, their_head)), (tail, best_at(head, their_head, their_tail)))
        gains = ("never" if b is None else f"{100 * (a / max(b, 1e-12) - 1):+.1f} %" for a, b in pairs)
        lines.append("| " + " | ".join((variant, str(len(ours)), *gains)) + " |")
    note = (
        "Relative difference of NDCG@10 in the full ranking, mean over common seeds, no interval. The other model's\n"
        f"scores get a weight of {POPULARITY_WEIGHTS[0]} .. {POPULARITY_WEIGHTS[-1]} times "
        "log(1 + training interactions), the best for it on these users.\n"
    )
    return "\n".join(lines) + "\n\n" + note


def best_at(level: float, along: np.ndarray, wanted: np.ndarray) -> float | None:
    """The highest of what is wanted where a curve, straight between its points, is at a level or above; None: nowhere.

    Args:
        along, wanted: ``[n]``, the points.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = (level - along[:-1]) / np.diff(along)  # [n - 1]
        crossings = (wanted[:-1] + parts * np.diff(wanted))[(parts >= 0) & (parts <= 1)]
    return max([*crossings, *wanted[along >= level]], default=None)


def balance_curve(cells: Sequence[dict[str, Any]]) -> np.ndarray:
    """NDCG@10 of head and of tail at each popularity weight, mean over seeds: ``[2, weights]``."""
    return np.mean([[cell["balance"]["head"], cell["balance"]["tail"]] for cell in cells], axis=0)


def cell_ranks(cell: dict[str, Any], folder: Path) -> Any:
    return np.load(folder / f"{cell['data']}.{cell['variant']}.{cell['seed']}.npz")


def user_gains(cells: Sequence[dict[str, Any]], folder: Path, ranking: str) -> np.ndarray:
    """NDCG@10 of each test user, mean over seeds: ``[n]``."""
    return np.mean([hits_and_gains(cell_ranks(c, folder)[ranking])["NDCG@10"] for c in cells], axis=0)


def slices_of(cell: dict[str, Any], folder: Path) -> dict[str, np.ndarray]:
    """Which users count in overall, head, tail: bool ``[n]`` each."""
    is_head = cell_ranks(cell, folder)["is_head"]
    return {"overall": np.ones(len(is_head), dtype=bool), "head": is_head, "tail": ~is_head}


def paired_bootstrap(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float, float]:
    """Relative difference of the means, its 95 % interval, and the two-sided p that it is 0.

    Users are drawn with replacement, each with both of its values.

    Args:
        ours, theirs: ``[n]``, of the same users.
    """
    rng = np.random.default_rng(0)
    # Ranks give few values: of users who have the same two, it only matters how many are drawn.
    kinds, sizes = np.unique(np.stack((ours, theirs), axis=1), axis=0, return_counts=True)
    drawn = (rng.multinomial(len(ours), sizes / len(ours), _CHUNK) for _ in range(RESAMPLES // _CHUNK))
    resampled = np.concatenate([counts @ kinds for counts in drawn]).T  # [2, RESAMPLES]
    differences = resampled[0] - resampled[1]
    low, high = np.quantile(differences / np.maximum(resampled[1], 1e-12), (0.025, 0.975))
    p = 2 * (1 + min((differences <= 0).sum(), (differences >= 0).sum())) / (1 + RESAMPLES)
    return ours.sum() / max(theirs.sum(), 1e-12) - 1, low, high, min(p, 1.0)


def describe(difference: float, low: float, high: float, p: float) -> str:
    return f"{100 * difference:+.1f} % ({100 * low:+.1f} .. {100 * high:+.1f}), p = {p:.2g}"
