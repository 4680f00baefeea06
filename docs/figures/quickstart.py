"""
Draw a run's scores: the mean score of y1, y2, ... on the held-out prompts, round by round.

    python docs/figures/quickstart.py runs/quickstart

In: `round_*/metrics.json` of a run directory. Out: an SVG, `docs/figures/quickstart.svg` by default, the same bytes for the
same scores. Bars are standard errors over prompts. Nothing is computed here that the run has not written down.
"""

import argparse
import json
from pathlib import Path

import matplotlib


matplotlib.use("svg")
# Text stays text, and ids do not change from run to run
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "trl-ext", "font.size": 11})

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402


GRAY = "#7a7f87"  # 4:1 on white and on GitHub's dark background
COLORS = ("#d1642a", "#2f7fd8", "#2a9d6f", "#9a63d8", "#b98a1d", "#c2528b")
MARKERS = "osD^vP"
DODGE = 0.07  # between the turns of a round, so that error bars do not hide each other


def read_metrics(run: Path) -> dict[int, dict]:
    """Metrics of each evaluated round, by its number."""
    files = sorted(run.glob("round_*/metrics.json"))
    if not files:
        raise SystemExit(f"{run} has no round_*/metrics.json: no round of this run has been evaluated.")
    return {int(file.parent.name.removeprefix("round_")): json.loads(file.read_text()) for file in files}


def draw(metrics: dict[int, dict], output: Path) -> None:
    """Write the figure."""
    rounds = sorted(metrics)
    turns = len(metrics[rounds[0]]["turns"])
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    highest, lowest = 0.0, 0.0
    for turn in range(turns):
        offset = (turn - (turns - 1) / 2) * DODGE
        points = [
            (number + offset, values["score"], values["standard_error"] or 0.0)
            for number in rounds
            if (values := metrics[number]["turns"][turn])["score"] is not None
        ]
        if not points:
            continue
        x, scores, errors = zip(*points, strict=True)
        highest, lowest = max(highest, *scores), min(lowest, *scores)
        axes.errorbar(
            x,
            scores,
            yerr=errors,
            label=f"y{turn + 1}" + (" (direct)" if turn == 0 else ""),
            color=COLORS[turn % len(COLORS)],
            marker=MARKERS[turn % len(MARKERS)],
            markersize=4.5,
            linewidth=2 if turn == 0 else 1.1,
            elinewidth=1.5,
            capsize=2.5,
        )
    if 0 <= lowest and highest <= 1:  # a share
        axes.set_ylim(0, 1.02)
    axes.set_xticks(rounds, [f"round {number}" if number else "before\nround 1" for number in rounds])
    axes.yaxis.set_major_locator(MaxNLocator(5))
    prompts = max(values["prompts"] for values in metrics.values())
    axes.set_ylabel(f"mean score, {prompts} held-out prompts", color=GRAY)
    axes.tick_params(colors=GRAY, length=0)
    axes.grid(axis="y", color=GRAY, alpha=0.25, linewidth=0.8)
    axes.spines[:].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=turns, frameon=False, labelcolor=GRAY)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the scores of an ARIES run.")
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "quickstart.svg")
    args = parser.parse_args(argv)
    draw(read_metrics(args.run), args.output)
    print(args.output)


if __name__ == "__main__":
    main()
