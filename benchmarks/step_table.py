"""The Markdown tables of benchmarks/steps.py, made of its results alone."""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

#: around a table in a page
_START, _END = "<!-- steps: benchmarks/steps.py writes this table -->\n", "<!-- end of steps -->"
_ALL: Final = (
    "contender",
    "step",
    "floor",
    "peak memory",
    "saved for backward",
    "first two steps, cold",
    "warm",
    "quantizers",
    "loss of step 10",
)
#: heading → contenders of which the fastest is shown: channels-last or not, ours in autocast or not
_TIMES: Final = {
    "float32": "float",
    "hyperblock-int8": "hyperblock-int8",
    "hyperblock-int4": "hyperblock-int4",
    "integers: tensor-int8": "tensor-int8, auto",
    "integers: in-hindsight-w8a8g8": "in-hindsight-w8a8g8, auto",
    "integers: hyperblock-int8-wide": "hyperblock-int8-wide, auto",
    "torchao": "torchao",
    "QPyTorch": "QPyTorch",
}
#: heading → contender whose bytes are shown
_BYTES: Final = {'saved, `save="int8"`': "hyperblock-int8, save int8", '`save="int4"`': "hyperblock-int4, save int4"}

#: behind the name of a contender
_ORDERS: Final = ("", ", channels-last")

#: what rows of one table have in common
_SHAPE: Final = ("model", "threads", "batch", "width", "depth")

Row = dict[str, Any]


def render_summary(results: dict[str, Any]) -> str:
    """Return one line a model: times and saved bytes, as ratios to the rival in float with the least time."""
    lines = []
    for group in _group_rows(results["rows"]):
        best = find_best(group)
        times = (_summarize_times(group, name, best) for name in _TIMES.values())
        saved = (_summarize_bytes(group, name, best) for name in _BYTES.values())
        lines.append([_name_group(group[0]), f"{1000 * statistics.median(best['seconds']):.0f} ms", *times, *saved])
    return _write_table(["model", "fastest float", *_TIMES, *_BYTES], lines)


def render(results: dict[str, Any]) -> str:
    """Return a table for each model, with every contender and every figure."""
    tables = []
    for group in _group_rows(results["rows"]):
        best, machine = find_best(group), results.get("machine", {}).get(str(group[0]["threads"]))
        lines = [_list_cells(row, best, machine) for row in group]
        tables.append(f"{_name_group(group[0])}:\n\n{_write_table(_ALL, lines)}")
    return "\n".join(tables)


def find_floor(row: Row, best: Row, machine: dict[str, float] | None) -> float | None:
    """Return the least time of contractions and of saved bytes over the time of the rival.

    Operations run at the measured peak of integer products, and saved bytes, written and read, at the speed of a copy.
    None for contenders that multiply floats: the matrix product that was measured is slower than convolutions.
    """
    if machine is None or ", auto" not in row["contender"]:
        return None
    seconds = row["operations"] / machine["int8"] + 2 * row["saved"] / machine["copy"]
    return float(seconds / statistics.median(best["seconds"]))


def find_best(group: list[Row]) -> Row:
    """Return the row of the fastest rival in float.

    Raises:
        ValueError: no rival in float ran.
    """
    rivals = [row for row in group if row["contender"].startswith("float") and "error" not in row]
    if not rivals:
        raise ValueError(f"steps: no rival in float ran on {group[0]['model']}")
    return min(rivals, key=lambda row: statistics.median(row["seconds"]))


def find_ratio(row: Row, best: Row) -> float:
    """Return the median of time over time of the rival, round by round."""
    return statistics.median(_list_ratios(row, best))


def _list_ratios(row: Row, best: Row) -> list[float]:
    return [own / other for own, other in zip(row["seconds"], row.get("rival", best["seconds"]), strict=True)]


def replace_rows(old: list[Row], new: list[Row], order: list[str]) -> list[Row]:
    """Return all rows, the new ones of one model in place of those of the same contenders.

    Others of the model keep the seconds of the rival whose rounds they shared.

    Args:
        order: of the contenders.
    """
    own = [row for row in old if _find_shape(row) == _find_shape(new[0])]
    shared = {"rival": find_best(own)["seconds"]} if own else {}
    measured = {row["contender"] for row in new}
    kept = [row if "error" in row else {**shared, **row} for row in own if row["contender"] not in measured]
    joined = sorted((*kept, *new), key=lambda row: order.index(row["contender"]))
    groups = [joined if group[0] in own else group for group in _group_rows(old)]
    return [row for group in (groups if own else [*groups, joined]) for row in group]


def _find_shape(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in _SHAPE)


def _group_rows(rows: list[Row]) -> list[list[Row]]:
    """Return the rows of each model, batch, size and number of threads."""
    keys = list(map(_find_shape, rows))
    return [[row for row, other in zip(rows, keys, strict=True) if other == key] for key in dict.fromkeys(keys)]


def _name_group(row: Row) -> str:
    sizes = [f"batch {row['batch']}" * bool(row["batch"])]
    sizes += [f"{name} × {row[name]:g}" for name in ("width", "depth") if row[name] != 1]
    sizes += [f"{row['threads']} threads"] * (row["threads"] > 1)
    return ", ".join([row["model"], *filter(None, sizes)])


def _find_rows(group: list[Row], name: str) -> list[Row]:
    """Return what ran of a contender: in both orders of memory, and in autocast unless float is asked for."""
    kinds = [name] if name == "float" else [name, f"{name}, bfloat16"]
    names = [kind + order for kind in kinds for order in _ORDERS]
    return [row for row in group if row["contender"] in names and "error" not in row]


def _summarize_times(group: list[Row], name: str, best: Row) -> str:
    return _show_least(find_ratio(row, best) for row in _find_rows(group, name))


def _summarize_bytes(group: list[Row], name: str, best: Row) -> str:
    return _show_least(row["saved"] / best["saved"] for row in _find_rows(group, name))


def _show_least(ratios: Iterable[float]) -> str:
    least = min(ratios, default=None)
    return "–" if least is None else f"{least:.2f}"


def _list_cells(row: Row, best: Row, machine: dict[str, float] | None) -> list[str]:
    if "error" in row:
        return [row["contender"], f"failed: {row['error'].replace('|', '/')[:100]}", *[""] * (len(_ALL) - 2)]
    floor = find_floor(row, best, machine)
    return [
        row["contender"],
        _render_time(row, best),
        "–" if floor is None else f"{floor:.2f}",
        _render_bytes(row["peak"], best["peak"]),
        _render_bytes(row["saved"], best["saved"]),
        f"{row['cold']:.0f} s",
        f"{row['warm']:.1f} s",
        str(row["quantizers"] or "–"),
        f"{row['loss']:.3f}",
    ]


def _render_time(row: Row, best: Row) -> str:
    """Milliseconds of the rival; of others the median ratio and half the distance of its quartiles."""
    if row is best:
        return f"{1000 * statistics.median(row['seconds']):.0f} ms, 1"
    ratios = _list_ratios(row, best)
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return f"{middle:.2f} ± {(high - low) / 2:.2f}"


def _render_bytes(own: int, other: int) -> str:
    return f"{own / 1e6:.1f} MB, {own / other:.2f}" if own >= 0 and other > 0 else "not measured"


def _write_table(head: Any, lines: list[list[str]]) -> str:
    rows = [list(head), ["---"] * len(list(head)), *lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def write_into(path: Path, table: str) -> None:
    """Write a table between the marks of a page.

    Raises:
        ValueError: the page has no marks.
    """
    before, start, rest = path.read_text(encoding="utf-8").partition(_START)
    _, end, behind = rest.partition(_END)
    if not start or not end:
        raise ValueError(
            f"steps: {path} has no place for the table; valid: a page with the lines {_START!r} and {_END!r}"
        )
    path.write_text(f"{before}{_START}{table}{_END}{behind}", encoding="utf-8")
