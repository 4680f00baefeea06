"""
Draw and sum up what tdpo_frontier.py measured.

    python -m docs.evidence.real.tdpo_frontier_figure

In: `tdpo_frontier.csv`. Out: `tdpo_frontier.svg` beside it, and the tables of tdpo_frontier.md on stdout. Intervals are 95 % by Student's t over seeds.
"""

import argparse
import statistics
from pathlib import Path

from ..figures import GRAY, save, subplots
from ..small.tdpo_frontier_figure import reward_at
from ..tables import cell, grouped, read, t_interval, table


HERE = Path(__file__).parent
COLORS = {"DPO": GRAY, "TDPO1": "#d1642a", "TDPO2, α = 0.3": "#5b9fe0", "TDPO2, α = 0.5": "#1b4f8a"}
BUDGETS = (1.0, 2.0, 4.0, 8.0)  # nats
COLUMNS = {  # of the last table: name, heading, digits
    "reward": ("reward", 3),
    "kl": ("KL(π‖π_ref)", 2),
    "seq_kl_chosen": ("SeqKL(y_w)", 2),
    "seq_kl_rejected": ("SeqKL(y_l)", 2),
    "difference": ("difference", 2),
    "accuracy": ("accuracy", 3),
    "entropy": ("entropy", 3),
    "length": ("tokens", 1),
    "finished": ("finished", 3),
    "distinct_2": ("distinct-2", 3),
}


def reached(values: list[float | None], sign: str = "") -> str:
    """A cell of the runs that passed a budget, with their number if some did not."""
    found = [value for value in values if value is not None]
    return cell(found, sign=sign) + (f" ({len(found)} of {len(values)})" if 0 < len(found) < len(values) else "")


def read_runs(path: Path) -> dict[tuple[str, float], dict[float, list[dict]]]:
    """Of each method and β, the evaluations of each seed."""
    rows = read(path, texts=["method"])
    for row in rows:
        row["difference"] = row["seq_kl_rejected"] - row["seq_kl_chosen"]
    return {
        of: {seed: run for (seed,), run in grouped(group, "seed").items()}
        for of, group in sorted(grouped(rows, "method", "beta").items(), key=lambda item: item[0][1])
    }


def tables(runs: dict[tuple[str, float], dict[float, list[dict]]]) -> str:
    budgets = [f"{budget:g} {'nat' if budget == 1 else 'nats'}" for budget in BUDGETS]
    at = {
        of: {seed: [reward_at(run, budget) for budget in BUDGETS] for seed, run in seeds.items()}
        for of, seeds in runs.items()
    }
    rewards = [
        [method, f"{beta:g}", *(reached(list(values)) for values in zip(*seeds.values(), strict=True))]
        for (method, beta), seeds in at.items()
    ]

    def gain(method: str, beta: float, budget: int) -> list[float | None]:
        pairs = [(mine[budget], at["DPO", beta][seed][budget]) for seed, mine in at[method, beta].items()]
        return [None if None in pair else pair[0] - pair[1] for pair in pairs]

    gains = [
        [method, f"{beta:g}", *(reached(gain(method, beta, i), "+") for i in range(len(BUDGETS)))]
        for method, beta in at
        if method != "DPO"
    ]
    last = [
        [
            method,
            f"{beta:g}",
            *(cell([run[-1][name] for run in seeds.values()], digits) for name, (_, digits) in COLUMNS.items()),
        ]
        for (method, beta), seeds in runs.items()
    ]
    start = next(iter(runs.values()))[0.0][0]
    return "\n".join(
        (
            "Reward when the KL first passes so many nats\n",
            table(["method", "β", *budgets], rewards),
            "More reward than DPO with the same β and seed at the same KL\n",
            table(["method", "β", *budgets], gains),
            "At the last step\n",
            table(["method", "β", *(heading for heading, _ in COLUMNS.values())], last),
            "The reference\n",
            table(
                ["reward", "entropy", "tokens", "finished", "distinct-2"],
                [
                    [
                        f"{start[name]:.{COLUMNS[name][1]}f}"
                        for name in ("reward", "entropy", "length", "finished", "distinct_2")
                    ]
                ],
            ),
        )
    )


def draw(runs: dict[tuple[str, float], dict[float, list[dict]]], path: Path) -> None:
    """Means over seeds. The intervals of reward and KL are drawn on the frontier of each β."""
    betas = sorted({beta for _, beta in runs})
    first = betas[0]
    figure, axes = subplots(2, 3, (11.5, 6.4))
    panels = [(f"Reward against KL(π‖π_ref), β = {beta:g}", "kl", "reward", beta) for beta in betas[:2]]
    panels += [
        (f"{title}, β = {first:g}", "step", name, first)
        for title, name in (
            ("SeqKL(y_w)", "seq_kl_chosen"),
            ("SeqKL(y_l)", "seq_kl_rejected"),
            ("SeqKL(y_l) − SeqKL(y_w)", "difference"),
            ("Entropy per token", "entropy"),
        )
    ]
    for ax, (title, x, y, beta) in zip(axes.flat, panels, strict=False):
        for method, seeds in ((method, seeds) for (method, b), seeds in runs.items() if b == beta):
            color = COLORS[method]
            points = [
                {name: [row[name] for row in rows] for name in (x, y)} for rows in zip(*seeds.values(), strict=True)
            ]
            means = [[statistics.mean(point[name]) for point in points] for name in (x, y)]
            ax.plot(*means, color=color, label=method, marker="o", markersize=3, linewidth=1.2)
            if x == "kl" and len(seeds) > 1:
                xerr, yerr = ([t_interval(point[name]) for point in points] for name in (x, y))
                ax.errorbar(*means, xerr=xerr, yerr=yerr, color=color, linewidth=0, elinewidth=0.6, alpha=0.6)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("nats" if x == "kl" else "step")
        if x == "kl":
            ax.set_xlim(0, 1.5 * BUDGETS[-1])
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax in axes.flat[: len(betas[:2])]:
        ax.legend(fontsize=8, frameon=False)
    save(figure, path, transparent=False)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=HERE / "tdpo_frontier.csv")
    args = parser.parse_args(argv)
    runs = read_runs(args.csv)
    print(tables(runs))
    draw(runs, args.csv.with_suffix(".svg"))


if __name__ == "__main__":
    main()
