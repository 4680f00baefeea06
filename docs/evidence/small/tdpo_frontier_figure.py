"""
Draw and sum up what tdpo_frontier.py measured.

    python -m docs.evidence.small.tdpo_frontier_figure

In: `tdpo_frontier.csv`. Out: `tdpo_frontier.svg`, and the tables of tdpo_frontier.md on stdout. Intervals are 95 % by Student's t over seeds.
"""

import statistics
from pathlib import Path

from ..figures import GRAY, save, subplots
from ..tables import cell, grouped, read, table


HERE = Path(__file__).parent
COLORS = (GRAY, "#d1642a", "#9ec7f2", "#5b9fe0", "#2f7fd8", "#1b4f8a")
BUDGETS = (1.0, 2.0, 4.0)  # nats
DRAWN_BETA = 0.1
COLUMNS = {  # of the last table: name, heading, digits
    "reward": ("reward", 3),
    "kl": ("KL(π‖π_ref)", 2),
    "seq_kl_chosen": ("SeqKL(y_w)", 2),
    "seq_kl_rejected": ("SeqKL(y_l)", 2),
    "difference": ("difference", 2),
    "accuracy": ("accuracy", 3),
    "entropy": ("entropy", 3),
    "distinct_2": ("distinct-2", 3),
}


def reward_at(run: list[dict], budget: float) -> float | None:
    """A run's reward when its KL first passes the budget, between the two evaluations around it; `None` if it does not."""
    for before, after in zip(run, run[1:], strict=False):
        if before["kl"] <= budget < after["kl"]:
            share = (budget - before["kl"]) / (after["kl"] - before["kl"])
            return before["reward"] + share * (after["reward"] - before["reward"])
    return None


def main() -> None:
    rows = read(HERE / "tdpo_frontier.csv", texts=["method"])
    for row in rows:
        row["difference"] = row["seq_kl_rejected"] - row["seq_kl_chosen"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    betas = sorted({row["beta"] for row in rows})
    runs = grouped(rows, "method", "beta", "seed")

    def of(method: str, beta: float) -> list[list[dict]]:
        return [run for (m, b, _), run in runs.items() if (m, b) == (method, beta)]

    print("Reward when the KL passes so many nats\n")
    lines = []
    for method in methods:
        for beta in betas:
            found = [
                [r for run in of(method, beta) if (r := reward_at(run, budget)) is not None] for budget in BUDGETS
            ]
            lines.append([method, f"{beta:g}", *map(cell, found)])
    print(table(["method", "β", *(f"{budget:g} nats" for budget in BUDGETS)], lines))

    print("At the last step\n")
    lines = []
    for method in methods:
        for beta in betas:
            last = [run[-1] for run in of(method, beta)]
            cells = (cell([row[name] for row in last], digits) for name, (_, digits) in COLUMNS.items())
            lines.append([method, f"{beta:g}", *cells])
    print(table(["method", "β", *(heading for heading, _ in COLUMNS.values())], lines))

    figure, axes = subplots(2, 2, (8.5, 6.4))
    panels = {
        "Reward against KL(π‖π_ref), all β": ("kl", "reward"),
        f"SeqKL(y_w), β = {DRAWN_BETA:g}": ("step", "seq_kl_chosen"),
        f"SeqKL(y_l) − SeqKL(y_w), β = {DRAWN_BETA:g}": ("step", "difference"),
        f"Entropy per token, β = {DRAWN_BETA:g}": ("step", "entropy"),
    }
    for ax, (title, (x, y)) in zip(axes.flat, panels.items(), strict=True):
        for method, color in zip(methods, COLORS, strict=False):
            for beta in betas if x == "kl" else [DRAWN_BETA]:
                by_step = grouped((row for run in of(method, beta) for row in run), "step")
                means = [[statistics.mean(row[key] for row in group) for group in by_step.values()] for key in (x, y)]
                style = {"marker": "o", "markersize": 3, "linewidth": 0 if x == "kl" else 1.2}
                ax.plot(*means, color=color, label=method if beta == DRAWN_BETA else None, **style)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("nats" if x == "kl" else "step")
        ax.spines[["top", "right"]].set_visible(False)
    axes.flat[0].set_xlim(0, 8)
    axes.flat[0].legend(fontsize=8, frameon=False)
    save(figure, HERE / "tdpo_frontier.svg", transparent=False)


if __name__ == "__main__":
    main()
