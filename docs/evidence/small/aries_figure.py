"""
Draw and sum up what aries.py measured.

    python -m docs.evidence.small.aries_figure

In: `aries.csv`. Out: `aries.svg`, and the tables of aries.md on stdout. Intervals are 95 % by Student's t over seeds.
"""

import statistics
from pathlib import Path

from ..figures import GRAY, bare, curve, labelled, legend, save, subplots
from ..tables import cell, grouped, read, table


HERE = Path(__file__).parent
TEXTS = ("task", "method", "guard", "health", "lost", "ended")
BASE = "ARIES, DPO"
TURNS = ("y1", "y2", "y3", "y4")
DRAWN = {
    "ARIES, DPO": "#2f7fd8",
    "ARIES, TDPO": "#2a9d6f",
    "best answers": "#9a63d8",
    "iterative DPO, samples": "#d1642a",
    "by rule": GRAY,
}
WRONG = ("no NLL", "few pairs", "150 prompts", "by rule", "by reward model")  # in the table of what the checks saw


def of(rows: list[dict], task: str, method: str) -> dict[float, list[dict]]:
    """A method's rows by round; a run that was stopped has fewer."""
    found = [row for row in rows if (row["task"], row["method"]) == (task, method)]
    return {number: group for (number,), group in sorted(grouped(found, "round").items())}


def percent(rows: list[dict], key: str) -> str:
    return cell([100 * row[key] for row in rows], 1)


def ends(rows: list[dict], task: str) -> str:
    """Before the first round, and after the last one of each run."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows if row["task"] == task):
        rounds = of(rows, task, method)
        if not lines:
            lines.append(["SFT", *(percent(rounds[0], key) for key in (*TURNS, "y2_of_another")), "", "", ""])
        last = [run[-1] for run in grouped((r for group in rounds.values() for r in group), "seed").values()]
        trained = [row for number, group in rounds.items() if number > 0 for row in group]
        work = [
            f"{statistics.mean(sum(r[key] for r in run) for run in grouped(trained, 'seed').values()):,.0f}"
            for key in ("pairs", "rows", "tokens")
        ]
        lines.append([method, *(percent(last, key) for key in (*TURNS, "y2_of_another")), *work])
    head = ["", *TURNS, "y2, another's draft", "pairs", "training rows", "tokens generated"]
    return table(head, lines)


def differences(rows: list[dict], task: str) -> str:
    """From ARIES with DPO after the last round, within each seed, in points."""
    # Later rounds in the place of earlier ones
    last = {(row["method"], row["seed"]): row for row in rows if row["task"] == task}
    lines = []
    for method in dict.fromkeys(method for method, _ in last if method != BASE):
        pairs = [(row, last[BASE, seed]) for (name, seed), row in last.items() if name == method]
        lines.append([method, *(cell([100 * (row[key] - base[key]) for row, base in pairs], 1, "+") for key in TURNS)])
    return table(["", *TURNS], lines)


def by_round(rows: list[dict], task: str, keys: tuple[str, ...]) -> str:
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows if row["task"] == task):
        rounds = of(rows, task, method)
        for key in keys:
            lines.append([method, key, *(percent(rounds[n], key) if n in rounds else "" for n in range(4))])
    return table(["", "answer", "SFT", "round 1", "round 2", "round 3"], lines)


def checks(rows: list[dict]) -> str:
    """What the checks saw in the runs that degenerate, each seed's rounds behind each other."""

    def each(run: list[dict], key: str, form: str = "{}") -> str:
        return ", ".join(form.format(row[key]) if row[key] == row[key] else "–" for row in run[1:])

    lines = []
    for (method, seed), run in grouped((r for r in rows if r["method"] in WRONG), "method", "seed").items():
        lines.append(
            [
                method,
                f"{seed:.0f}",
                each(run, "pairs", "{:.0f}"),
                each(run, "guard_difference", "{:+.2f}"),
                each(run, "guard"),
                each(run, "kl_per_token", "{:.2g}"),
                each(run, "health"),
                ", ".join(row["lost"] or "–" for row in run[1:]),
                ", ".join(f"{100 * row['y1']:.1f}" for row in run),
                ", ".join(f"{100 * row['y2']:.1f}" for row in run),
            ]
        )
    head = [
        "",
        "seed",
        "pairs",
        "chosen − rejected",
        "guard",
        "KL per token",
        "health",
        "said to have lost",
        "y1, from SFT on",
        "y2",
    ]
    return table(head, lines)


def draw(rows: list[dict], output: Path) -> None:
    figure, axes = subplots(2, 2, (8.5, 6.6), sharey="row")
    for ax, key, title in zip(axes[0], ("y1", "y2"), ("direct answer, y1", "refined, y2"), strict=True):
        for method, color in DRAWN.items():
            rounds = of(rows, "sorting", method)
            points = {number: [100 * row[key] for row in group] for number, group in rounds.items()}
            curve(ax, points, color, label=method, linewidth=1.8)
        ax.set_title(f"sorting: {title}", fontsize=10, color=GRAY)
        ax.set_xticks(range(4), ["SFT", "1", "2", "3"])
        ax.set_xlabel("round", color=GRAY)
    for ax, task in zip(axes[1], ("sorting", "editing"), strict=True):
        for method, color in DRAWN.items():
            for number, style in ((0, ":"), (3, "-")):
                group = of(rows, task, method).get(number)
                if group is None or (number == 0 and method != BASE):
                    continue
                means = [100 * statistics.mean(row[key] for row in group) for key in TURNS]
                shown = {"color": GRAY, "label": "SFT"} if number == 0 else {"color": color}
                ax.plot(TURNS, means, linestyle=style, marker="o", markersize=3, linewidth=1.8, **shown)
        ax.set_title(f"{task}: answers in the chain, after round 3", fontsize=10, color=GRAY)
    for ax in axes.flat:
        ax.set_ylim(0, 100)
        bare(ax)
    for ax in axes[:, 0]:
        ax.set_ylabel("right, %", color=GRAY)
    legend(figure, labelled(*axes[:, 0]), 3)
    save(figure, output)


def main() -> None:
    rows = read(HERE / "aries.csv", TEXTS)
    print("Sorting, after the last round\n", ends(rows, "sorting"), sep="\n")
    print("Sorting, difference from ARIES with DPO, within each seed\n", differences(rows, "sorting"), sep="\n")
    print("Sorting, round by round\n", by_round(rows, "sorting", ("y1", "y2")), sep="\n")
    print("Editing, after the last round\n", ends(rows, "editing"), sep="\n")
    print("Editing, difference from ARIES with DPO, within each seed\n", differences(rows, "editing"), sep="\n")
    print("Editing, round by round\n", by_round(rows, "editing", ("y1", "y4")), sep="\n")
    for task in ("editing, short SFT", "small edits, short SFT"):
        print(f"{task[0].upper()}{task[1:]}, round by round\n", by_round(rows, task, TURNS), sep="\n")
    print("What the checks saw\n", checks(rows), sep="\n")
    draw(rows, HERE / "aries.svg")


if __name__ == "__main__":
    main()
