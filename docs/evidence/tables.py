"""
What the figures and tables here are made with: rows of a CSV file, groups of them, Markdown tables and intervals over seeds.
"""

import csv
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path


def read(path: Path, texts: Sequence[str]) -> list[dict]:
    """The rows; what is not named in `texts` is a number, NaN where it is empty."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v if k in texts else float(v or "nan") for k, v in row.items()} for row in rows]


def write(rows: list[dict], path: Path) -> None:
    """A CSV file, numbers to five places; what a row lacks stays empty."""
    with open(path, "w", newline="") as file:
        names = dict.fromkeys(name for row in rows for name in row)
        writer = csv.DictWriter(file, fieldnames=names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def grouped(rows: Iterable[dict], *keys: str) -> dict[tuple, list[dict]]:
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in keys)].append(row)
    return groups


def t_interval(values: list[float]) -> float:
    """Half the width of the 95 % interval of a mean over seeds, by Student's t."""
    n = len(values)
    if n < 2:
        return math.nan
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}[n]
    return t * statistics.stdev(values) / math.sqrt(n)


def cell(values: list[float], digits: int = 3, sign: str = "") -> str:
    """Mean ± half the interval; `sign="+"` writes that of the mean."""
    if not values:
        return "not reached"
    mean = f"{round(statistics.mean(values), digits) + 0.0:{sign}.{digits}f}"  # + 0.0: no "-0.0"
    return mean + (f" ± {t_interval(values):.{digits}f}" if len(values) > 1 else "")


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
