"""Tables as text: every report is rendered here, for a terminal or in Markdown. Names are never read as markup."""

import dataclasses
import io
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text


@dataclasses.dataclass(frozen=True)
class Table:
    """A title, the names of the columns, and rows with a value for each column."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]


#: a report: tables, and lines of text between them
Parts: TypeAlias = Iterable[Table | str]


def to_text(parts: Parts, width: int = 160, *, color: bool = False) -> str:
    """The parts for a terminal of so many columns, without a line break at the end."""
    file = io.StringIO()
    console = Console(file=file, width=width, color_system="standard" if color else None)
    for part in parts:
        console.print(part if isinstance(part, str) else _rich(part), markup=False, highlight=False)
    return file.getvalue().rstrip()


def to_markdown(parts: Parts) -> str:
    """The parts in Markdown: a heading for each table, a list for the lines."""
    return "\n".join(f"* {_escape(part)}" if isinstance(part, str) else _markdown(part) for part in parts)


def _rich(table: Table) -> RichTable:
    made = RichTable(title=Text(table.title))
    for name in table.head:
        made.add_column(Text(name))
    for row in table.rows:
        made.add_row(*(Text(str(cell)) for cell in row))
    return made


def _markdown(table: Table) -> str:
    cells = [table.head, ["---"] * len(table.head), *table.rows]
    body = "\n".join(f"| {' | '.join(_escape(str(cell)) for cell in row)} |" for row in cells)
    return f"## {_escape(table.title)}\n\n{body}\n"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
