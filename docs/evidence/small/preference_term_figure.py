"""
Draw and sum up what preference_term.py measured.

    python -m docs.evidence.small.preference_term_figure

In: `preference_term.csv`. Out: `preference_term.svg`, and the table of preference_term.md on stdout. Intervals are 95 % by Student's t over seeds.
"""

import statistics
from pathlib import Path

from matplotlib.patches import Rectangle

from ..figures import GRAY, bare, legend, save, subplots
from ..tables import cell, grouped, read, table


HERE = Path(__file__).parent
COLORS = {"on": "#2f7fd8", "off": GRAY, "flipped": "#d1642a"}


def gains(rows: list[dict], key: str = "y1") -> list[float]:
    """What training added to an answer's share of right ones, in points, each seed."""
    return [100 * (row[key] - row[f"start_{key}"]) for row in rows]


def main() -> None:
    rows = read(HERE / "preference_term.csv", ("setting", "term"))
    groups = grouped(rows, "setting", "term")
    start = next(iter(groups.values()))
    lines = [
        ["start, after SFT", "", *(cell([100 * r[f"start_{k}"] for r in start], 1) for k in ("y1", "y2")), "", ""]
    ]
    for (setting, term), group in groups.items():
        shares = [cell([100 * row[key] for row in group], 1) for key in ("y1", "y2")]
        each = ", ".join(f"{gain:+.1f}" for gain in gains(group))
        lines.append([setting, term, *shares, cell(gains(group), 1, "+"), each])
    print(table(["trained with", "preference term", "y1", "y2", "gain of y1", "each seed"], lines))

    settings = list(dict.fromkeys(setting for setting, _ in groups))
    figure, axes = subplots(1, 1, (7, 3.4))
    for place, setting in enumerate(settings):
        terms = [term for term in COLORS if (setting, term) in groups]
        for offset, term in enumerate(terms):
            values = gains(groups[setting, term])
            x = place + 0.26 * (offset - (len(terms) - 1) / 2)
            axes.bar(x, statistics.mean(values), width=0.24, color=COLORS[term], alpha=0.6)
            axes.plot([x] * len(values), values, "o", color=COLORS[term], markersize=3.5)
    axes.axhline(0, color=GRAY, linewidth=0.8)
    axes.set_xticks(range(len(settings)), settings)
    axes.set_ylabel("gain of y1, points", color=GRAY)
    bare(axes)
    patches = [
        Rectangle((0, 0), 1, 1, color=color, alpha=0.6, label=f"preference term {term}")
        for term, color in COLORS.items()
    ]
    legend(figure, patches, 3)
    save(figure, HERE / "preference_term.svg")


if __name__ == "__main__":
    main()
