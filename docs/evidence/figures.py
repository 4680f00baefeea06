"""
How the figures here are drawn: SVGs whose text stays text, and whose bytes depend on the numbers and on matplotlib's version alone.

matplotlib is imported by the first drawing, so that the experiments run without it.
"""

import statistics
from pathlib import Path


GRAY = "#7a7f87"  # 4:1 on white and on GitHub's dark background


def subplots(rows: int, columns: int, size: tuple[float, float], **options):
    """A figure, `size` inches wide and high, and its panels, as pyplot's function of this name makes them."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "trl-ext", "font.size": 10})
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def bare(ax) -> None:
    """No frame and no ticks, only gray lines to read values at."""
    ax.tick_params(colors=GRAY, length=0)
    ax.grid(axis="y", color=GRAY, alpha=0.25, linewidth=0.8)
    ax.spines[:].set_visible(False)


def curve(ax, points: dict, color: str, **style) -> None:
    """Means of the values at each x, and a band from the least to the greatest."""
    x, values = list(points), list(points.values())
    ax.plot(x, [*map(statistics.mean, values)], color=color, **style)
    ax.fill_between(x, [*map(min, values)], [*map(max, values)], color=color, alpha=0.12, linewidth=0)


def labelled(*axes) -> list:
    """What has a label in some panels."""
    return [artist for ax in axes for artist in ax.get_legend_handles_labels()[0]]


def legend(figure, artists: list, columns: int, fontsize: float = 9) -> None:
    """Above the panels, with the labels of the artists."""
    look = {"frameon": False, "labelcolor": GRAY, "fontsize": fontsize}
    figure.legend(handles=artists, loc="outside upper center", ncols=columns, **look)


def save(figure, path: Path, *, transparent: bool = True) -> None:
    figure.savefig(path, format="svg", transparent=transparent, metadata={"Date": None, "Creator": None})
