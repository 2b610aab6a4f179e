"""``h2rec plan``: what a catalog costs, before anything is bought."""

from __future__ import annotations

import re
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from h2rec.cli.console import output as console
from h2rec.planning import GPUS, Device, Plan, Work

_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def _count(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.strip().replace(",", "").upper())
    if found is None:
        raise typer.BadParameter(f"expected a number such as 100M, got {text!r}")
    return round(float(found[1]) * _SUFFIXES[found[2]])


def plan(
    items: Annotated[
        int, typer.Option(parser=_count, metavar="COUNT", help="Items of the catalog: 250000, 100M, 1.5B.")
    ],
    dim: Annotated[int, typer.Option(min=1, help="Size of the vectors.")] = 64,
    levels: Annotated[int, typer.Option(min=1, help="Codes of an item.")] = 4,
    codebook: Annotated[int, typer.Option(min=1, metavar="SIZE", help="Codewords of a level.")] = 256,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs, which share out the rows of the hash table.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Users per step and GPU.")] = 256,
    length: Annotated[int, typer.Option(min=1, help="Items of a user's sequence.")] = 50,
    layers: Annotated[int, typer.Option(min=1, help="Layers of a backbone.")] = 2,
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="Of tables and activations: float32 or bfloat16.")
    ] = "float32",
    dense: Annotated[
        bool, typer.Option("--dense", help="AdamW on the whole table, instead of row-wise Adagrad.")
    ] = False,
) -> None:
    """Estimate the memory and the least time of training H2Rec on a catalog, on four kinds of GPU.

    From counted bytes and operations, at the rates of data sheets. Small steps take longer: they wait for launches.

    \b
    Example:
        h2rec plan --items 100M --dim 128 --levels 4 --codebook 8192 --gpus 8
        h2rec plan --items 2M --batch 128 --length 200 --dense
    """
    planned = Plan(items, dim, levels, codebook, gpus, batch, length, layers, dtype, not dense)
    console.print(_memory_table(planned))
    console.print(_work_table("One training step, of each GPU", planned.step(), total=True))
    beside = [*planned.tokenizing(), *planned.ranking()]
    console.print(_work_table("Beside training, of each GPU", beside, total=False))
    console.print("\nbound by m: memory, p: products, i: instructions, n: network\n", style="dim")
    for device in GPUS:
        console.print(_summary(planned, device), highlight=False, soft_wrap=True)
    console.print("\nRates: NVIDIA's data sheets (A100 80GB SXM, H100 SXM, H200 SXM, HGX B200).", style="dim")


def _memory_table(planned: Plan) -> Table:
    where = "the GPU" if planned.gpus == 1 else f"each of {planned.gpus} GPUs"
    table = _table(f"Memory of {where}")
    table.add_column("what")
    table.add_column("bytes", justify="right")
    memory = planned.memory()
    for name, size in memory.items():
        table.add_row(name, _amount(size, "B"))
    table.add_section()
    table.add_row("together", _amount(sum(memory.values()), "B"), style="bold")
    return table


def _work_table(title: str, work: list[Work], *, total: bool) -> Table:
    table = _table(title)
    table.add_column("work")
    table.add_column("bytes", justify="right")
    table.add_column("FLOP", justify="right")
    for device in GPUS:
        table.add_column(device.name, justify="right")
    for part in work:
        amounts = (_amount(part.bytes or part.sent, "B"), _amount(part.products, ""))
        times = (
            Text.assemble(_seconds(part.seconds(device)), (f" {part.limit(device)[0]}", "dim"))
            for device in GPUS
        )
        table.add_row(part.name, *amounts, *times)
    if total:
        sums = (
            _amount(sum(part.bytes for part in work), "B"),
            _amount(sum(part.products for part in work), ""),
        )
        times = (_seconds(sum(part.seconds(device) for part in work)) for device in GPUS)
        table.add_section()
        table.add_row("together", *sums, *(f"{time}  " for time in times), style="bold")
    return table


def _summary(planned: Plan, device: Device) -> str:
    step = planned.step()
    seconds = sum(part.seconds(device) for part in step)
    by_limit: dict[str, float] = {}
    for part in step:
        limit = part.limit(device)
        by_limit[limit] = by_limit.get(limit, 0.0) + part.seconds(device)
    limit = max(by_limit, key=by_limit.__getitem__)
    memory = sum(planned.memory().values())
    fits = "fits" if memory < device.memory else "[bold red]does not fit[/]"
    return (
        f"[bold]{device.name}[/]: {_amount(memory, 'B')} {fits} into {_amount(device.memory, 'B')}; "
        f"{planned.gpus * planned.batch / seconds:,.0f} users/s at most; "
        f"bound by {limit} for {by_limit[limit] / seconds:.0%} of a step"
    )


def _table(title: str) -> Table:
    # So narrow, names of operators fit into 80 columns.
    narrow = {"box": SIMPLE_HEAD, "padding": 0, "show_edge": False}
    return Table(title=f"\n{title}", title_justify="left", title_style="bold", **narrow)


def _amount(amount: float, unit: str) -> str:
    for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if amount >= scale:
            return f"{amount / scale:.3g} {prefix}{unit}"
    return f"{amount:.3g} {unit}" if amount else ""


def _seconds(seconds: float) -> str:
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
