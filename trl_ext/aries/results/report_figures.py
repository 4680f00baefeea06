"""
Figures of the pages: numbers in, inline SVG out.

Text stays text and colours are CSS variables, so that a figure follows the page into dark mode and onto paper. Besides its colour, each
series has its own marker and dash. Values appear on hovering. The same numbers give the same bytes.
"""

import io
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from .pages import decimals, interval


# Placeholder colours -> CSS variables of the page
SERIES = tuple(f"#a1000{i}" for i in range(1, 7))
INK, GRID, GOOD, BAD = "#b10001", "#b10002", "#b10003", "#b10004"
PAINT = {color: f"var(--series-{i})" for i, color in enumerate(SERIES, start=1)}
PAINT |= {INK: "var(--muted)", GRID: "var(--line)", GOOD: "var(--good)", BAD: "var(--bad)"}
MARKERS = "osD^vP"
DASHES = ("-", (0, (5, 1.5)), (0, (2, 1)), "-.", (0, (4, 1, 1, 1, 1, 1)), (0, (1, 1)))

# The width of a phone, so that text need not shrink
WIDTH, HEIGHT = 4.3, 2.9
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
DODGE = 0.07  # between series, so that their intervals do not overlap
BINS = 20
HOVERS = 100  # of a curve
RADIUS = 5.0  # of what is hovered over, in points

Turns = list[dict[str, Any]]  # the `turns` of a round's metrics
Segment = tuple[str, list[float], list[float]]  # a round's name, steps and values of a logged metric


class Hover(NamedTuple):
    """A text that appears over a point or, without `y`, over a column of the figure, as wide as a bar of 1."""

    axes: Axes
    x: float
    y: float | None
    text: str
    width: float = 1.0


def render(name: str, title: str, draw: Callable[..., list[Hover]], height: float = HEIGHT, panels: int = 1) -> Markup:
    """
    Draw a figure. `name` is unique on the page and begins the ids inside the figure; `title` describes it for screen readers. `draw` gets the
    axes, `panels` of them one above the other, and returns what appears on hovering.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained", dpi=72)  # an SVG's points
        grid = figure.subplots(panels, sharex=True, squeeze=False)[:, 0]
        for axes in grid:
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.grid(axis="y", color=GRID, linewidth=0.8)
            axes.tick_params(length=0)
            axes.set_axisbelow(True)
            axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
        hovers = draw(*grid)
        handles, labels = grid[0].get_legend_handles_labels()
        if len(labels) > 1:
            columns = min(len(labels), 4)
            figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False, columnspacing=1.2)
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
        shapes = "".join(hovered(hover, 72 * height) for hover in hovers)
    return inline(file.getvalue().replace("</svg>", f"{shapes}</svg>"), name, title)


def hovered(hover: Hover, height: float) -> str:
    """The invisible shape that has a text. Figures begin at the bottom, SVG begins at the top."""
    text = f'fill-opacity="0"><title>{escape(hover.text)}</title>'
    if hover.y is not None:
        x, y = hover.axes.transData.transform((hover.x, hover.y))
        return f'<circle cx="{x:.1f}" cy="{height - y:.1f}" r="{RADIUS}" {text}</circle>'
    box = hover.axes.bbox
    left, right = (hover.axes.transData.transform((hover.x + side * hover.width / 2, 0.0))[0] for side in (-1.0, 1.0))
    place = f'x="{left:.1f}" y="{height - box.y1:.1f}" width="{right - left:.1f}" height="{box.height:.1f}"'
    return f"<rect {place} {text}</rect>"


def said(values: dict[str, Any]) -> str:
    """A score with its interval and, if some prompts have none, its number of answers."""
    bounds = f" {interval(values['interval'])}" if values["interval"] else ""
    return f"{decimals(values['score'])}{bounds}, {values['scored']:,} answers"


def policy(number: int) -> str:
    return "start" if number == 0 else f"round {number}"


def inline(svg: str, name: str, title: str) -> Markup:
    """Turn an SVG file into a part of a page: no prolog, no background, the page's own ids and colours."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub("#[ab]1000[1-6]", lambda match: PAINT[match.group()], svg)
    head = rf'<svg role="img" aria-labelledby="{name}-title" \1><title id="{name}-title">{escape(title)}</title>'
    return Markup(re.sub(r"<svg ([^>]*)>", lambda match: match.expand(head), svg, count=1))


def look(index: int) -> dict[str, Any]:
    """Colour, marker and dash of a series."""
    return {
        "color": SERIES[index % len(SERIES)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index % len(DASHES)],
        "markersize": 4,
        "linewidth": 1.6,
    }


def turn_name(turn: int) -> str:
    return f"y{turn}" + (" (direct)" if turn == 1 else "")


def round_axis(axes: Axes, rounds: Sequence[int]) -> None:
    word = "round " if len(rounds) <= 6 else "r"
    axes.set_xticks(list(rounds), ["start" if number == 0 else f"{word}{number}" for number in rounds])
    axes.set_xlim(min(rounds) - 0.4, max(rounds) + 0.4)


def score_by_round(metrics: dict[int, Turns], label: str) -> Markup:
    title = f"{label} by round, one line for each answer of the chain"
    return render("score-by-round", title, lambda axes: lines_by_turn(axes, metrics, label))


def lines_by_turn(axes: Axes, metrics: dict[int, Turns], label: str) -> list[Hover]:
    """Scores by round, a line per turn."""
    turns, hovers = len(next(iter(metrics.values()))), []
    for turn in range(turns):
        offset = (turn - (turns - 1) / 2) * DODGE
        points = [(n + offset, of_round[turn], f"{policy(n)}, y{turn + 1}") for n, of_round in metrics.items()]
        hovers += line(axes, points, turn_name(turn + 1), turn)
    round_axis(axes, list(metrics))
    score_axis(axes, label)
    return hovers


def score_by_turn(metrics: dict[int, Turns], label: str) -> Markup:
    """A line per round; with many rounds, only the first and the last three."""
    shown = list(metrics) if len(metrics) <= 4 else [*list(metrics)[:1], *list(metrics)[-3:]]

    def draw(axes: Axes) -> list[Hover]:
        hovers = []
        for index, number in enumerate(shown):
            offset = (index - (len(shown) - 1) / 2) * DODGE
            points = [(turn["turn"] + offset, turn, f"{policy(number)}, y{turn['turn']}") for turn in metrics[number]]
            hovers += line(axes, points, policy(number), index)
        turns = [turn["turn"] for turn in metrics[shown[0]]]
        axes.set_xticks(turns, [turn_name(turn) for turn in turns])
        axes.set_xlim(turns[0] - 0.4, turns[-1] + 0.4)
        score_axis(axes, label)
        return hovers

    return render(
        "score-by-turn", f"{label} from the direct answer to the last refinement, one line for each round", draw
    )


def selecting_and_judging(judging: dict[int, Turns], selecting: dict[int, Turns]) -> Markup:
    """Goodhart's curve: what judges above what selects, a line per turn in each. They part when one rises and the other falls."""

    def draw(above: Axes, below: Axes) -> list[Hover]:
        above_hovers = lines_by_turn(above, judging, "judging score")
        return above_hovers + lines_by_turn(below, selecting, "selecting score")

    title = "Mean judging score and mean selecting score by round, one line for each answer of the chain"
    return render("selecting-and-judging", title, draw, height=2 * HEIGHT, panels=2)


def score_by_run(turn: int, lines: dict[str, list[tuple[int, dict[str, Any]]]]) -> Markup:
    """A line per run, of one turn."""

    def draw(axes: Axes) -> list[Hover]:
        hovers = []
        for index, (name, points) in enumerate(lines.items()):
            offset = (index - (len(lines) - 1) / 2) * DODGE
            named = [(number + offset, metrics, f"{name}, {policy(number)}") for number, metrics in points]
            hovers += line(axes, named, name, index)
        round_axis(axes, sorted({number for points in lines.values() for number, _ in points}))
        score_axis(axes, f"mean score of {turn_name(turn)}")
        return hovers

    return render(f"score-of-y{turn}", f"Mean score of y{turn} by round, one line for each run", draw)


def line(axes: Axes, points: list[tuple[float, dict[str, Any], str]], label: str, index: int) -> list[Hover]:
    """Scores with their intervals. A point has its place, its metrics and its name."""
    points = [point for point in points if point[1]["score"] is not None]
    if not points:
        return []
    xs, scores = [x for x, _, _ in points], [turn["score"] for _, turn, _ in points]
    intervals = [turn["interval"] or [turn["score"]] * 2 for _, turn, _ in points]
    errors = [[max(0.0, s - i[0]) for s, i in zip(scores, intervals, strict=True)]]
    errors += [[max(0.0, i[1] - s) for s, i in zip(scores, intervals, strict=True)]]
    axes.errorbar(xs, scores, yerr=errors, label=label, elinewidth=1.2, capsize=2, **look(index))
    return [Hover(axes, x, turn["score"], f"{name}: {said(turn)}") for x, turn, name in points]


def histogram(policies: dict[str, list[list[float | None]]], label: str) -> Markup:
    """
    Scores by turn, one panel for each, of one or two policies: the last one as bars, the one before as a line.

    Args:
        policies (`dict[str, list[list[float | None]]]`):
            For each policy its name and, for each turn, the scores that are shown.
        label (`str`):
            What the scores are.
    """
    columns = {name: [[s for s in turn if s is not None] for turn in turns] for name, turns in policies.items()}
    everything = [score for turns in columns.values() for turn in turns for score in turn]
    edges = np.linspace(min(everything), max(everything), BINS + 1)
    *before, last = columns

    def draw(*panels: Axes) -> list[Hover]:
        hovers = []
        for turn, axes in enumerate(panels):
            counts = {name: np.histogram(turns[turn], edges)[0] for name, turns in columns.items()}
            axes.bar(edges[:-1], counts[last], np.diff(edges), align="edge", color=SERIES[1], label=last, alpha=0.6)
            for name in before:
                axes.stairs(counts[name], edges, color=SERIES[0], linewidth=1.4, label=name)
            axes.set_ylabel(f"y{turn + 1}", rotation=0, ha="right", va="center")
            axes.yaxis.set_major_locator(MaxNLocator(2, integer=True))
            for place, (low, high) in enumerate(pairwise(edges)):
                text = ", ".join(f"{name} {of_policy[place]:,}" for name, of_policy in counts.items())
                where = f"y{turn + 1}, {decimals(low)} to {decimals(high)}"
                hovers.append(Hover(axes, (low + high) / 2, None, f"{where}: {text}", high - low))
        panels[-1].set_xlabel(label)
        return hovers

    turns = len(columns[last])
    title = f"Number of evaluation answers by {label}, one panel for each answer of the chain"
    return render("histogram", title, draw, height=0.6 + 0.75 * turns, panels=turns)


def score_axis(axes: Axes, label: str) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_ylabel(label)


def flips(metrics: dict[int, Turns], keys: tuple[str, str], parent: str, names: tuple[str, str]) -> Markup:
    """Bars up and down: how many answers refining made better and worse, by round and turn."""
    bars = [
        (f"{'start' if number == 0 else f'r{number}'}\ny{turn['turn']}", turn[parent])
        for number, turns in metrics.items()
        for turn in turns
        if turn[parent]
    ]

    def draw(axes: Axes) -> list[Hover]:
        xs = range(len(bars))
        up, down = ([values[key] for _, values in bars] for key in keys)
        axes.bar(xs, up, 0.7, color=GOOD, label=names[0])
        axes.bar(xs, [-n for n in down], 0.7, color=BAD, label=names[1], hatch="////", edgecolor=GRID)
        axes.set_xlim(-0.6, max(len(bars), 6) - 0.4)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_xticks(list(xs), [name for name, _ in bars], fontsize=8 if len(bars) <= 12 else 6)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):.0f}")
        axes.set_ylabel("answers")
        return [
            Hover(axes, x, None, f"{name.replace(chr(10), ', ')}: {up[x]:,} {names[0]}, {down[x]:,} {names[1]}")
            for x, (name, _) in enumerate(bars)
        ]

    return render("flips", f"Answers that refining changed: {names[0]} (up) and {names[1]} (down)", draw)


def lengths(metrics: dict[int, Turns]) -> Markup:
    """Mean tokens, a line per turn."""

    def draw(axes: Axes) -> list[Hover]:
        hovers = []
        for turn in range(len(next(iter(metrics.values())))):
            points = [(n, turns[turn]["tokens"]) for n, turns in metrics.items() if turns[turn]["tokens"] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=turn_name(turn + 1), **look(turn))
            hovers += [
                Hover(axes, n, tokens, f"{policy(n)}, y{turn + 1}: {tokens:,.1f} tokens") for n, tokens in points
            ]
        round_axis(axes, list(metrics))
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_ylabel("mean tokens of an answer")
        return hovers

    return render(
        "lengths", "Mean length of the answers in tokens by round, one line for each answer of the chain", draw
    )


def divergence(kl: dict[int, dict[str, Any]]) -> Markup:
    """KL to the policy before round 1, with two standard errors."""

    def draw(axes: Axes) -> list[Hover]:
        values = [entry["per_answer"] for entry in kl.values()]
        errors = [2 * (entry["standard_error"] or 0.0) for entry in kl.values()]
        axes.errorbar(list(kl), values, yerr=errors, elinewidth=1.2, capsize=2, **look(0))
        round_axis(axes, list(kl))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_ylabel("KL to the start, nats per answer")
        return [
            Hover(axes, n, value, f"{policy(n)}: {decimals(value)} ± {decimals(error)} nats")
            for n, value, error in zip(kl, values, errors, strict=True)
        ]

    return render(
        "divergence", "KL of the policy to the one before round 1, in nats per direct answer, by round", draw
    )


def curves(name: str, title: str, metrics: dict[str, list[Segment]]) -> Markup:
    """Logged metrics of the training over its steps, round after round."""

    def draw(axes: Axes) -> list[Hover]:
        hovers = []
        for index, (metric, segments) in enumerate(metrics.items()):
            points = [
                (step, value, label)
                for label, steps, values in segments
                for step, value in zip(steps, values, strict=True)
            ]
            for step, value, label in points[:: -(-len(points) // HOVERS)]:
                hovers.append(Hover(axes, step, value, f"{metric}, {label}, step {step:,.0f}: {decimals(value)}"))
            style = look(index) | {"markersize": 3, "linewidth": 1.4}
            for place, (_, steps, values) in enumerate(segments):
                style["marker"] = MARKERS[index] if len(steps) < 30 else ""
                axes.plot(steps, values, label=None if place else metric, **style)
        segments = next(iter(metrics.values()))
        for (_, before, _), (_, steps, _) in pairwise(segments):
            axes.axvline((before[-1] + steps[0]) / 2, color=GRID, linewidth=1, linestyle=(0, (3, 3)))
        if len(segments) > 1:
            for label, steps, _ in segments:
                text = label if len(segments) <= 4 else label.replace("round ", "r")
                where = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom", "fontsize": 8}
                axes.text((steps[0] + steps[-1]) / 2, 1.01, text, **where)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("step")
        return hovers

    return render(name, f"{title} over the training steps", draw, height=2.3)
