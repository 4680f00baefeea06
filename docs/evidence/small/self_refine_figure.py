"""
Draw and sum up what self_refine.py measured.

    python -m docs.evidence.small.self_refine_figure

In: `self_refine.csv`. Out: `self_refine.svg`, and the tables of self_refine.md on stdout. Intervals are 95 % by Student's t over seeds; a difference
is taken within each seed, whose runs have the same reference and the same pairs.
"""

import statistics
from pathlib import Path

from ..figures import GRAY, bare, curve, labelled, legend, save, subplots
from ..tables import cell, grouped, read, t_interval, table


HERE = Path(__file__).parent
COLORS = {0.0: GRAY, 0.1: "#2a9d6f", 0.3: "#2f7fd8", 0.5: "#9a63d8", 1.0: "#d1642a"}
LINE = {"linewidth": 1.8, "marker": "o", "markersize": 3}
BETA, PAIRS = 0.1, 1600
LABELS = {0.0: "right", 0.2: "20 % flipped"}
NAMES = {"sigmoid": "DPO", "ipo": "IPO"}
# (key, head, digits); shares and accuracies in percent
AT_THE_END = [
    ("marginal", "marginal, nats", 2),
    ("accuracy", "accuracy", 1),
    ("accuracy_under_p", "accuracy under p", 1),
    ("share", "share of the margin", 3),
    ("held_out_loss", "loss", 3),
    ("right_digits", "right digits", 1),
]
CORRELATIONS = [
    ("pearson", "Pearson", 3),
    ("spearman", "Spearman", 3),
    ("kendall", "Kendall", 3),
    ("delta_pearson", "Δ: Pearson", 3),
    ("delta_spearman", "Δ: Spearman", 3),
    ("delta_kendall", "Δ: Kendall", 3),
    ("delta_marginal_pearson", "Δ with the marginal", 3),
]
DIFFERENCES = [column for column in AT_THE_END if column[0] not in ("accuracy_under_p", "share")] + CORRELATIONS[:3]
OVERFITTING = [
    ("accuracy_gap", "accuracy, learned − held-out", 1),
    ("marginal_gap", "marginal, learned − held-out", 2),
    ("accuracy", "accuracy", 1),
    ("held_out_loss", "loss", 3),
    ("flipped_accuracy", "wrong labels learned", 1),
]
PERCENT = {"accuracy", "accuracy_under_p", "right_digits", "accuracy_gap", "flipped_accuracy"}


def method(row: dict) -> str:
    name, weight = NAMES[row["loss"]], row["weight"]
    if row["beta"] != BETA:
        return f"{name}, β = {row['beta']:g}"
    return f"Sr-{name}, λ = {weight:g}" if weight else name


def with_gaps(row: dict) -> dict:
    return row | {
        "accuracy_gap": row["train_accuracy"] - row["accuracy"],
        "marginal_gap": row["train_marginal"] - row["marginal"],
    }


def cells(rows: list[dict], columns: list[tuple[str, str, int]], base: list[dict] | None = None) -> list[str]:
    """A cell per column; with `base`, of the differences from its rows, seed by seed."""
    found = []
    for key, _, digits in columns:
        scale = 100 if key in PERCENT else 1
        values = [scale * row[key] for row in rows if row[key] == row[key]]  # NaN: there is none
        if base is not None:
            others = {row["seed"]: scale * row[key] for row in base}
            values = [scale * row[key] - others[row["seed"]] for row in rows if row[key] == row[key]]
        found.append(cell(values, digits, "+" if base is not None else "") if values else "")
    return found


def head(columns: list[tuple[str, str, int]], *before: str) -> list[str]:
    return [*before, *(f"{name}, %" if key in PERCENT else name for key, name, _ in columns)]


def tables(rows: list[dict]) -> str:
    last = [with_gaps(row) for row in rows if row["step"] == max(row["step"] for row in rows)]
    main = grouped((row for row in last if row["pairs"] == PAIRS), "flipped", "loss", "weight", "beta")
    text = ""
    for title, columns in (("At the last step", AT_THE_END), ("Correlation with the known gap", CORRELATIONS)):
        lines = [[LABELS[of[0]["flipped"]], method(of[0]), *cells(of, columns)] for of in main.values()]
        text += f"{title}\n\n{table(head(columns, 'labels', 'method'), lines)}\n"

    lines = []
    for (flipped, loss, weight, beta), of in main.items():
        if (weight, beta) != (0, BETA):
            base = main[flipped, loss, 0, BETA]
            lines.append([LABELS[flipped], method(of[0]), *cells(of, DIFFERENCES, base)])
    text += f"Difference from λ = 0\n\n{table(head(DIFFERENCES, 'labels', 'method'), lines)}\n"

    sizes = grouped(
        (row for row in last if row["loss"] == "sigmoid" and row["beta"] == BETA), "flipped", "pairs", "weight"
    )
    drawn = {weight for _, pairs, weight in sizes if pairs != PAIRS}
    sizes = {key: sizes[key] for key in sorted(sizes) if key[2] in drawn}
    lines = [
        [LABELS[flipped], f"{pairs:g}", method(of[0]), *cells(of, OVERFITTING)]
        for (flipped, pairs, _), of in sizes.items()
    ]
    text += f"Overfitting\n\n{table(head(OVERFITTING, 'labels', 'pairs', 'method'), lines)}\n"
    lines = [
        [LABELS[flipped], f"{pairs:g}", method(of[0]), *cells(of, OVERFITTING, sizes[flipped, pairs, 0])]
        for (flipped, pairs, weight), of in sizes.items()
        if weight
    ]
    text += f"Overfitting, difference from DPO\n\n{table(head(OVERFITTING, 'labels', 'pairs', 'method'), lines)}\n"

    reference = list({row["seed"]: row for row in rows if row["step"] == 0}.values())
    columns = [("logp_spearman", "given x", 3), ("logp_under_p_spearman", "given p ⊕ x", 3)]
    knows = table(head(columns), [cells(reference, columns)])
    return text + f"Spearman of the reference's log-probabilities with the gap\n\n{knows}"


def draw_marginals(ax, rows: list[dict]) -> None:
    for (weight,), of in grouped(rows, "weight").items():
        points = {step: [row["marginal"] for row in at] for (step,), at in grouped(of, "step").items()}
        curve(ax, points, COLORS[weight], label=method(of[0]), **LINE)
    ax.set_xlabel("step")


def draw_correlations(ax, rows: list[dict]) -> None:
    for (loss, weight), of in grouped(rows, "loss", "weight").items():
        values = [row["spearman"] for row in of]
        ax.errorbar(
            list(COLORS).index(weight) + (0.1 if loss == "ipo" else -0.1),
            statistics.mean(values),
            t_interval(values),
            color=COLORS[weight],
            marker="s" if loss == "ipo" else "o",
            markerfacecolor="none" if loss == "ipo" else COLORS[weight],
            markersize=6,
            capsize=3,
            linewidth=1.4,
        )
    ax.set_xticks(range(len(COLORS)), [f"{weight:g}" for weight in COLORS])
    ax.set_xlabel("λ  (● Sr-DPO, □ Sr-IPO; 0 is DPO, IPO)")


def draw_overfitting(ax, rows: list[dict], key: str) -> None:
    scale = 100 if key in PERCENT else 1
    for (weight,), of in grouped(rows, "weight").items():
        points = {size: [scale * row[key] for row in at] for (size,), at in grouped(of, "pairs").items()}
        if len(points) > 1:
            curve(ax, dict(sorted(points.items())), COLORS[weight], **LINE)
    sizes = sorted({row["pairs"] for row in rows})
    ax.set_xscale("log")
    ax.minorticks_off()
    ax.set_xticks(sizes, [f"{size:g}" for size in sizes])
    ax.set_xlabel("pairs, for the same number of steps")


def draw(rows: list[dict], output: Path) -> None:
    figure, axes = subplots(3, 2, (8.5, 9))
    last_step = max(row["step"] for row in rows)
    overfitting = {0.0: "marginal_gap", 0.2: "flipped_accuracy"}
    for (flipped, labels), column in zip(LABELS.items(), axes.T, strict=True):
        own = [with_gaps(row) for row in rows if row["flipped"] == flipped and row["beta"] == BETA]
        last = [row for row in own if row["step"] == last_step]
        draw_marginals(column[0], [row for row in own if row["pairs"] == PAIRS and row["loss"] == "sigmoid"])
        draw_correlations(column[1], [row for row in last if row["pairs"] == PAIRS])
        draw_overfitting(column[2], [row for row in last if row["loss"] == "sigmoid"], overfitting[flipped])
        column[0].set_title(f"labels: {labels}", color=GRAY, fontsize=11)
        column[0].set_ylabel("marginal on held-out pairs, nats")
        column[1].set_ylabel("Spearman of marginal and gap")
    axes[2, 0].set_ylabel("marginal, learned − held-out, nats")
    axes[2, 1].set_ylabel("wrong labels learned, %")
    for row in axes[:2]:
        row[1].sharey(row[0])
        row[0].autoscale()
    for ax in axes.flat:
        for label in (ax.xaxis.label, ax.yaxis.label):
            label.set_color(GRAY)
        bare(ax)
    legend(figure, labelled(axes[0, 0]), len(COLORS))
    save(figure, output)


def main() -> None:
    rows = read(HERE / "self_refine.csv", texts=["loss"])
    print(tables(rows))
    draw(rows, HERE / "self_refine.svg")


if __name__ == "__main__":
    main()
