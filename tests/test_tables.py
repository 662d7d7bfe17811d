"""Tables: what is the same in every row is said once if there is no room, what differs is never cut."""

import re

import pytest

from qcompiler.tables import Table, split_shared, to_markdown, to_text

SPECS = ["int8:real:tensor:nearest:pass", "int8:real:tensor:stochastic:pass:fixed(-1e-5,1e-5)"]


def joined(text):
    """The cells of a table that was folded, column by column, without the folds."""
    rows, found = [line.split("│")[1:-1] for line in text.splitlines() if line.startswith("│")], []
    for row in rows:
        if row[-1].strip():  # a new row: the last column is short
            found.append([cell.strip() for cell in row])
        else:
            found[-1] = [old + cell.strip() for old, cell in zip(found[-1], row, strict=True)]
    return found


@pytest.mark.parametrize(
    ("cells", "separator", "kept", "shared"),
    [
        (SPECS, ":", ["…:nearest:…", "…:stochastic:…:fixed(-1e-5,1e-5)"], "int8:real:tensor:…:pass:…"),
        (["a.b.0.x/w", "a.b.1.x/w"], ".", ["….0.…", "….1.…"], "a.b.….x/w"),
        (["a.b.x", "a.c"], ".", ["….b.x", "….c"], "a.…"),
        (["a.b", "a.b"], ".", ["…", "…"], "a.b"),
        (["a", "a.b"], ".", ["…", "….b"], "a.…"),
        (["a", "b.a"], ".", ["a", "b.a"], ""),
        (["a.b.c"], ".", ["a.b.c"], ""),
        ([], ".", [], ""),
    ],
)
def test_what_rows_share(cells, separator, kept, shared):
    assert split_shared(cells, separator) == (kept, shared)


def names(count):
    return [f"transformer.encoder_layers.{index}.attention.query_projection/grad" for index in range(count)]


def table(rows=3):
    cells = [[name, SPECS[index == 1], 1.5] for index, name in enumerate(names(rows))]
    return Table("Quantizers", ["quantizer", "spec", "harm"], cells, {"quantizer": ".", "spec": ":"})


def test_a_table_that_fits_is_whole():
    text = to_text([table()], 160)
    for cell in (*names(3), *SPECS):
        assert cell in text
    assert "…" not in text


def test_a_table_that_does_not_fit_says_once_what_rows_share():
    text = to_text([table()], 80)
    assert max(map(len, text.splitlines())) <= 80
    assert [row[1] for row in joined(text)] == ["…:nearest:…", "…:stochastic:…:fixed(-1e-5,1e-5)", "…:nearest:…"]
    assert [row[0] for row in joined(text)] == ["….0.…", "….1.…", "….2.…"]
    assert "quantizer, in every row: transformer.encoder_layers.….attention.query_projection/grad" in " ".join(
        text.split()
    )
    assert "spec, in every row: int8:real:tensor:…:pass:…" in text


@pytest.mark.parametrize("width", [30, 50])
def test_nothing_is_lost_where_there_is_no_room_at_all(width):
    text = to_text([table(1)], width)
    assert [row[:2] for row in joined(text)] == [[names(1)[0], SPECS[0]]]
    plain = to_text([Table("Names", ["name", "n"], [[name, 1] for name in names(2)])], width)
    assert [row[0] for row in joined(plain)] == names(2)


def test_markdown_is_whole():
    text = to_markdown([table()])
    assert all(cell in text for cell in (*names(3), *SPECS))
    assert not re.search("…", text)
