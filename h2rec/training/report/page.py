"""The report as HTML. Everything that comes from a run passes through ``escape``."""

from __future__ import annotations

import json
import math
from html import escape
from typing import Any

from h2rec.training.config import main_model
from h2rec.training.report import charts
from h2rec.training.report.run import BASELINE, ReportedRun
from h2rec.training.report.style import STYLE

_GROUPS = (("overall", "All items"), ("head", "Head items"), ("tail", "Tail items"))
_METRICS = ("HR@10", "NDCG@10")
_ALL_METRICS = ("HR@5", "HR@10", "HR@20", "NDCG@5", "NDCG@10", "NDCG@20")
_NO_VALUE = "\N{EN DASH}"


def render(run: ReportedRun) -> str:
    """The whole page."""
    negatives = run.metrics["ranking"]["negatives"]
    sections = [
        _headline(run),
        _section("Head and tail", _protocol_tables(run, negatives), _read_tables(run, negatives)),
        _section("By popularity", _wide_figure(charts.band_chart(run)), _READ_BANDS),
        '<div class="pair">',
        _section("Head against tail", _figure(charts.head_tail_chart(run)), _READ_SCATTER),
        _section("Semantic IDs", _codebooks(run), _READ_CODEBOOKS),
        "</div>",
        _section("Learning curves", _learning_curves(run), _READ_CURVES),
        _section("Models", _models_table(run), ""),
        _section("All metrics", _all_metrics(run, negatives), ""),
        _section("Settings", _settings(run), _READ_SETTINGS),
    ]
    title = escape(run.name)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>h2rec: {title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


_READ_BANDS = (
    "The test users are divided by how often the item they chose next occurs in training; each bar is the mean over "
    "the users named below it. Compare bars within a band, not between bands: a popular item is easier to rank for "
    "every model."
)
_READ_SCATTER = (
    "Further right is better on head items, further up is better on tail items. The two lines cross at the model on "
    "hash IDs only: a model in the upper right quarter improves on both without paying for one with the other."
)
_READ_CODEBOOKS = (
    "Codes in use is the share of a level's codewords that some item has; perplexity over size is 100% when items "
    "spread evenly over all of them. Items that share the whole semantic ID cannot be told apart by it, and only the "
    "hash ID separates them."
)
_READ_CURVES = (
    "The marker is the epoch whose weights were kept, the best NDCG@10 on the validation items. Losses of different "
    "models do not compare, because some add alignment losses to the one for the next item."
)
_READ_SETTINGS = (
    "These are the settings of config.json in the run directory; every model of the run was trained with the same, but "
    "for target_smoothing: where it is not set, h2rec has 0.3 and the others none. On a CPU a run with the same "
    "settings and seed on the same machine gives the same numbers."
)


def _read_tables(run: ReportedRun, negatives: int) -> str:
    history = "left out of" if run.metrics["ranking"]["history_masked"] else "ranked with"
    noise = ""
    tail, count = run.value(main_model(run.models), "full", "tail", "HR@10"), run.count("tail")
    if count and not math.isnan(tail):
        error = math.sqrt(tail * (1 - tail) / count)
        noise = f" With {count:,} test users in the tail, an HR@10 of {tail:.4f} has a standard error of {error:.4f}."
    return (
        "Head items are the 20% that occur most often in training, tail items are the rest; each user counts for the "
        "group of the held-out item. HR@10 is the share of users who find that item among the first ten, NDCG@10 also "
        "rewards a higher place. The full ranking is against the whole catalog, items of the user's history "
        f"{history} the others; the sampled one is against {negatives} random items that the user never chose, so its "
        f"values are higher and only compare with each other.{noise}"
    )


def _section(title: str, content: str, reading: str) -> str:
    reading = f'<p class="reading">{escape(reading)}</p>' if reading else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n{reading}\n</section>"


def _figure(svg: str) -> str:
    return f"<figure>{svg}</figure>"


def _wide_figure(svg: str) -> str:
    return f'<div class="scroll"><figure class="wide">{svg}</figure></div>'


def _headline(run: ReportedRun) -> str:
    facts = [f"{run.metrics['data'][what]:,} {what}" for what in ("users", "items", "interactions")]
    lead = main_model(run.models)
    cards = []
    for group, name in _GROUPS:
        value = run.value(lead, "full", group, "NDCG@10")
        gain = run.gain(lead, "full", group, "NDCG@10")
        against = f"{_gain(gain)} <span>against hash IDs only</span>" if not math.isnan(gain) else ""
        cards.append(
            f'<div class="card"><h3>{name}</h3><p class="number">{_number(value)}</p><p class="gain">{against}</p>'
            f'<p class="count">NDCG@10, {run.count(group):,} users</p></div>'
        )
    return (
        f'<header><p class="brand">h2rec</p><h1>{escape(run.name)}</h1>'
        f'<p class="facts">{" · ".join(facts)}</p></header>\n'
        f'<section class="lead"><h2>{escape(run.label(lead))}</h2><div class="cards">{"".join(cards)}</div></section>'
    )


def _protocol_tables(run: ReportedRun, negatives: int) -> str:
    protocols = (("full", "Full ranking"), ("sampled", f"{negatives} sampled negatives"))
    return "\n".join(f"<h3>{title}</h3>\n{_head_tail_table(run, protocol)}" for protocol, title in protocols)


def _head_tail_table(run: ReportedRun, protocol: str) -> str:
    cells = [(group, metric) for group, _ in _GROUPS for metric in _METRICS]
    best = {cell: _best([run.value(model, protocol, *cell) for model in run.models]) for cell in cells}
    top = "".join(
        f'<th colspan="2" scope="colgroup" class="group">{name}<small>{run.count(group):,} users</small></th>'
        for group, name in _GROUPS
    )
    second = "".join(f'<th scope="col"{_group_edge(i)}>{metric}</th>' for i, (_, metric) in enumerate(cells))
    rows = []
    for model in run.models:
        values = []
        for i, cell in enumerate(cells):
            value = run.value(model, protocol, *cell)
            gain = run.gain(model, protocol, *cell)
            below = _gain(gain) if not math.isnan(gain) else ("baseline" if model == BASELINE else "")
            text = f"<strong>{_number(value)}</strong>" if value == best[cell] else _number(value)
            values.append(f"<td{_group_edge(i)}>{text}<small>{below}</small></td>")
        rows.append(f'<tr><th scope="row">{_swatch(run, model)}</th>{"".join(values)}</tr>')
    return (
        '<div class="scroll"><table class="results">'
        f'<thead><tr><th rowspan="2" scope="col">Model</th>{top}</tr><tr>{second}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _group_edge(column: int) -> str:
    return "" if column % 2 else ' class="edge"'


def _best(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return max(known) if len(known) > 1 else math.nan


def _swatch(run: ReportedRun, model: str) -> str:
    colour = charts.series_variable(run, model)
    return f'<i class="swatch" style="background:var({colour})"></i>{escape(run.label(model))}'


def _codebooks(run: ReportedRun) -> str:
    stats = run.metrics["sid_stats"]
    facts = (
        f"<p>{stats['num_items']:,} items have {stats['distinct']:,} distinct semantic IDs; "
        f"{stats['collision_rate']:.1%} of the items share theirs with another, and the largest group that "
        f"shares one has {stats['largest_group']:,} items.</p>"
    )
    return _figure(charts.codebook_chart(run)) + facts


def _learning_curves(run: ReportedRun) -> str:
    figures = "".join(
        _figure(charts.curve_chart(run, column, label))
        for column, label in (("valid_NDCG@10", "validation NDCG@10"), ("train_loss", "training loss"))
    )
    return f'<div class="figures">{figures}</div>'


def _models_table(run: ReportedRun) -> str:
    rows = []
    for model in run.models:
        facts = run.metrics["models"][model]
        cells = (
            *(f"{facts[name]:,}" for name in ("parameters", "epochs", "best_epoch")),
            _duration(facts["seconds"]),
        )
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row">{_swatch(run, model)}</th>{row}</tr>')
    names = ("Parameters", "Epochs", "Best epoch", "Training time")
    heads = "".join(f'<th scope="col">{name}</th>' for name in names)
    return (
        f'<div class="scroll"><table><thead><tr><th scope="col">Model</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _all_metrics(run: ReportedRun, negatives: int) -> str:
    groups = [*(group for group, _ in _GROUPS), *run.bands()]
    heads = "".join(f'<th scope="col">{metric}</th>' for metric in _ALL_METRICS)
    parts = []
    for protocol, title in (("full", "full ranking"), ("sampled", f"{negatives} sampled negatives")):
        for model in run.models:
            rows = []
            for group in groups:
                values = (run.value(model, protocol, group, metric) for metric in _ALL_METRICS)
                cells = "".join(f"<td>{_number(value)}</td>" for value in values)
                count = f"<td>{run.count(group):,}</td>"
                rows.append(f'<tr><th scope="row">{escape(group)}</th>{count}{cells}</tr>')
            parts.append(
                f"<details><summary>{_swatch(run, model)}, {escape(title)}</summary>"
                '<div class="scroll"><table><thead><tr><th scope="col">Items</th><th scope="col">Users</th>'
                f"{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
            )
    return "\n".join(parts)


def _settings(run: ReportedRun) -> str:
    rows = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(_setting(value))}</dd></div>"
        for name, value in run.config.items()
    )
    return f'<dl class="settings">{rows}</dl>'


def _setting(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return _NO_VALUE if value is None else json.dumps(value)


def _number(value: float) -> str:
    return _NO_VALUE if math.isnan(value) else f"{value:.4f}"


def _gain(gain: float) -> str:
    sign = "+" if gain >= 0 else "\N{MINUS SIGN}"
    return f'<span class="{"up" if gain >= 0 else "down"}">{sign}{abs(gain):.1%}</span>'


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    )
