"""Bars that count rows of vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from h2rec.cli.console import output

if TYPE_CHECKING:
    from torch import Tensor

_BATCH_ROWS = 4096


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} rows/s", style="dim")


class RowProgress(Progress):
    """Each bar with its rate and the time that is left."""

    def __init__(self) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            _Rate(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"),
            console=output,
        )

    def add(self, description: str, total: int) -> Callable[..., None]:
        """A new bar, as a function of the rows that are done, and a ``note`` beside it."""
        task = self.add_task(description, total=total, note="")

        def show(done: int, note: str = "") -> None:
            self.update(task, completed=done, note=note)

        return show

    def reading(self, description: str, vectors: Any, total: int) -> Callable[[], Iterator[Tensor]]:
        """The same vectors, whose reading moves a new bar."""
        show = self.add(description, total)

        def batches() -> Iterator[Tensor]:
            from h2rec.ops.vector_batches import vector_batches

            done = 0
            for batch in vector_batches(vectors, _BATCH_ROWS):
                yield batch
                done += len(batch)
                show(done)

        return batches
