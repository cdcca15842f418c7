"""Progress bars on a terminal, and one line at the start and the end elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console()


class Advance(Protocol):
    """Sets a bar to ``done``, with a short note beside it."""

    def __call__(self, done: int, note: str = "") -> None: ...


@contextmanager
def bar(title: str, total: int) -> Iterator[Advance]:
    """Show progress towards ``total``."""
    if not console.is_terminal:
        yield from _lines(title, total)
        return
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn(), TextColumn("{task.fields[note]}"))  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total, note="")

        def advance(done: int, note: str = "") -> None:
            progress.update(task, completed=done, note=note)

        yield advance


def _lines(title: str, total: int) -> Iterator[Advance]:
    start = time.monotonic()
    shown, last_note = 0, ""

    def advance(done: int, note: str = "") -> None:
        nonlocal shown, last_note
        last_note = note or last_note
        if 10 * done // max(1, total) > shown:
            shown = 10 * done // max(1, total)
            print(f"{title}: {done}/{total} {note}", flush=True)

    yield advance
    print(f"{title}: done in {time.monotonic() - start:.1f} s  {last_note}", flush=True)
