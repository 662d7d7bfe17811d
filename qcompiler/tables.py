"""Tables as text: every report is rendered here, for a terminal or in Markdown. Names are never read as markup."""

import dataclasses
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

#: columns of a terminal that nothing is too wide for
_ENDLESS: Final = 1_000_000


@dataclasses.dataclass(frozen=True)
class Table:
    """A title, the names of the columns, and rows with a value for each column."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    #: column → the separator of the parts of a cell: `.` in names, `:` in specs. If the table is wider than the
    #: terminal, parts that are the same in every row become one line below the table.
    parted: Mapping[str, str] = dataclasses.field(default_factory=dict)


#: a report: tables, and lines of text between them
Parts: TypeAlias = Iterable[Table | str]


def to_text(parts: Parts, width: int = 160, *, color: bool = False) -> str:
    """Return the parts for a terminal of so many columns, without a line break at the end."""
    file = io.StringIO()
    console = Console(file=file, width=width, color_system="standard" if color else None)
    for part in parts:
        for shown in [part] if isinstance(part, str) else _fit_table(part, console):
            console.print(shown, markup=False, highlight=False)
    return file.getvalue().rstrip()


def to_markdown(parts: Parts) -> str:
    """Return the parts in Markdown: a heading for each table, a list for the lines."""
    return "\n".join(f"* {_escape_text(part)}" if isinstance(part, str) else _write_markdown(part) for part in parts)


def _fit_table(table: Table, console: Console) -> list[RichTable | str]:
    """The table; if too wide, without the parts that are the same in every row, which lines below name."""
    made = _make_rich(table)
    natural = Measurement.get(console, console.options.update(width=_ENDLESS), made).maximum
    if natural <= console.width:
        return [made]
    short, lines = _drop_shared(table)
    return [_make_rich(short), *lines]


def _make_rich(table: Table) -> RichTable:
    """A cell that is too long for the column is folded, not cut."""
    made = RichTable(title=Text(table.title))
    for name in table.head:
        made.add_column(Text(name), overflow="fold")
    for row in table.rows:
        made.add_row(*(Text(str(cell)) for cell in row))
    return made


def _drop_shared(table: Table) -> tuple[Table, list[str]]:
    """(the table without the parts that all rows share, lines that tell these parts)."""
    columns = [[str(row[index]) for row in table.rows] for index in range(len(table.head))]
    lines = []
    for name, separator in table.parted.items():
        index = table.head.index(name)
        columns[index], shared = split_shared(columns[index], separator)
        lines += [f"{name}, in every row: {shared}"] if shared else []
    return dataclasses.replace(table, rows=list(zip(*columns, strict=True))), lines


def split_shared(cells: Sequence[str], separator: str) -> tuple[list[str], str]:
    """(every cell with … for the parts that are the same in all of them, these parts with … for the others).

    `["int8:real:b8:pass", "int4:real:b8:pass"]` at `:` → `["int8:…", "int4:…"]` and `…:real:b8:pass`. Cells that share
    nothing, and a cell that is alone, stay as they are; the second text is then empty.
    """
    parts = [cell.split(separator) for cell in cells]
    same = [len(set(column)) == 1 for column in zip(*parts, strict=False)]
    if len(cells) < 2 or not any(same):
        return list(cells), ""
    kept = [_join_parts(zip(row, [*same, *[False] * len(row)], strict=False), separator, hidden=True) for row in parts]
    longest = max(parts, key=len)
    return kept, _join_parts(zip(longest, [*same, *[False] * len(longest)], strict=False), separator, hidden=False)


def _join_parts(parts: Iterable[tuple[str, bool]], separator: str, *, hidden: bool) -> str:
    """Return the parts whose flag is not `hidden`, joined; a run of others is one …"""
    runs = itertools.groupby(parts, lambda part: part[1] is hidden)
    return separator.join("…" if is_hidden else separator.join(text for text, _ in run) for is_hidden, run in runs)


def _write_markdown(table: Table) -> str:
    cells = [table.head, ["---"] * len(table.head), *table.rows]
    body = "\n".join(f"| {' | '.join(_escape_text(str(cell)) for cell in row)} |" for row in cells)
    return f"## {_escape_text(table.title)}\n\n{body}\n"


def _escape_text(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def join_some(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and how many there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
