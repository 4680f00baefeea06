"""
The report: one self-contained `report.html` of a run, whether it is going on, finished or stopped.

In: the run directory. Out: a page of [`pages`], with figures drawn by matplotlib.
"""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...recipe import RecipeError
from ..checks.overlap import prompts_kind
from ..data.records import read_json
from ..run_dir import RunDir
from ..scoring.evaluation import of_turn
from .pages import write_page
from .report_data import (
    Change,
    RunRecord,
    changes,
    curve,
    drop_table,
    flat,
    read_run,
    time_table,
    token_table,
    training_table,
    warnings,
)
from .report_pairs import pair_samples
from .report_samples import samples


if TYPE_CHECKING:
    from markupsafe import Markup


NEEDS_MATPLOTLIB = "the report needs matplotlib (the extra `report`): `pip install matplotlib`"

Metrics = dict[int, list[dict[str, Any]]]  # the `turns` of each evaluated round

# Verdict on a change -> what the answers of a policy do
FINDINGS = {
    "higher": "score higher than at the start",
    "lower": "score lower than at the start",
    "no clear change": "show no clear change",
    "unknown": "cannot be compared with those at the start",
}

# Title of a figure -> metrics of the trainer's log that it shows, if they were logged
CURVES = {
    "Loss": ("loss",),
    "Reward accuracy": ("rewards/accuracies",),
    "Reward margin": ("rewards/margins",),
    "Log-probability of the answers": ("logps/chosen", "logps/rejected"),
    "Sequential KL to the reference": ("position_kl/chosen", "position_kl/rejected"),
    "Loss by kind of row": ("objective/direct", "objective/refinement"),
    "Refinement margin": ("refinement/margin",),
    "Preference accuracy under the refinement prompt": ("refinement/accuracies",),
    "Gradient norm": ("grad_norm",),
    "Entropy": ("entropy",),
    "Learning rate": ("learning_rate",),
}
# Metrics of a training whose last value is shown, if they were logged
LAST_LOGGED = {
    "step": "steps",
    "train_loss": "mean loss",
    "rewards/accuracies": "reward accuracy",
    "rewards/margins": "reward margin",
    "logps/chosen": "logps chosen",
    "logps/rejected": "logps rejected",
    "grad_norm": "gradient norm",
    "entropy": "entropy",
    "mean_token_accuracy": "token accuracy",
}


def report(path: Path) -> int:
    """
    `trl-ext aries report`: write the report of a run directory and print its path.

    Raises:
        [`RecipeError`]: not a run directory, a broken file in it, or matplotlib is missing.
    """
    written = write_report(path)
    print(f"{written} ({written.stat().st_size / 1024:,.0f} KiB)")  # noqa: T201
    return 0


def write_report(path: Path, running: bool | None = None) -> Path:
    """Write `report.html` into a run directory; `running` as in [`~aries.results.state.read_state`]."""
    if find_spec("matplotlib") is None:
        raise RecipeError(f"{NEEDS_MATPLOTLIB}.")
    return write_page(RunDir(path).report, "report.html.jinja", **view(read_run(path, running)))


def view(run: RunRecord) -> dict[str, Any]:
    """What the template needs."""
    metrics = {round_.number: round_.metrics["turns"] for round_ in run.evaluated}
    times = [event["time"] for event in run.events]
    binary = bool(run.evaluated) and all(
        turn["correct"] == turn["score"] for turns in metrics.values() for turn in turns if turn["score"] is not None
    )
    label = "accuracy" if binary else "mean score"
    compared = changes(run) if run.evaluated else {}
    training = training_table(run)
    manifests = [round_ for round_ in run.rounds if round_.manifest]
    return {
        "name": run.path.resolve().name,
        "run": run,
        "kind": prompts_kind(RunDir(run.path)),
        "label": label,
        "metrics": metrics,
        "changes": compared,
        "answer": headline(run, compared),
        "warnings": warnings(run),
        "started": times[0] if times else None,
        "ended": times[-1] if times else None,
        "figures": figures(run, metrics, label),
        "flipped": has_flips(metrics),
        "binary": binary,
        "curves": training_figures(run),
        "training": training,
        "last_logged": {key: title for key, title in LAST_LOGGED.items() if any(key in row for row in training)},
        "drops": drop_table(run),
        "pairs": pair_samples(run),
        "samples": samples(run) if run.evaluated else None,
        "times": time_table(run),
        "tokens": token_table(run),
        "settings": flat({key: value for key, value in run.resolved.items() if key != "inputs"}),
        "inputs": run.resolved["inputs"],
        "resolved": run.resolved,
        "manifests": manifests,
        "parity": {round_.number: read_json(round_.files.parity) for round_ in run.rounds},
    }


def headline(run: RunRecord, compared: dict[str, Change | None]) -> str:
    """Whether the policy got better, in one sentence that claims no more than the intervals do."""
    direct, refined = compared.get("direct"), compared.get("refined")
    if run.judged:
        return "A judge's scores say which answer of a chain is better, not whether one policy is better than another."
    if direct is None:
        return "There is nothing to compare yet: that takes the scores of two policies."
    name, unclear = run.evaluated[-1].name, f"Not measurably, on {direct.prompts:,} prompts"
    if refined is None or refined.verdict == direct.verdict:
        yes = {"higher": "Yes", "lower": "No"}.get(direct.verdict, unclear)
        which = "direct" if refined is None else "direct and the refined"
        return f"{yes}: the {which} answers of {name} {FINDINGS[direct.verdict]}."
    # They differ: the clear one comes first
    both = sorted(
        {"direct": direct, "refined": refined}.items(), key=lambda item: item[1].verdict not in ("higher", "lower")
    )
    verdicts = {change.verdict for _, change in both}
    yes = "In part" if "higher" in verdicts else "No" if "lower" in verdicts else unclear
    (first, of_first), (second, of_second) = both
    but = "but" if {"higher", "lower"} <= verdicts else "and"
    return f"{yes}: the {first} answers of {name} {FINDINGS[of_first.verdict]}, {but} its {second} answers {FINDINGS[of_second.verdict]}."


def has_flips(metrics: Metrics) -> bool:
    """Whether answers are right or wrong, rather than better or worse."""
    return any(turn["flips"] for turns in metrics.values() for turn in turns)


def figures(run: RunRecord, metrics: Metrics, label: str) -> dict[str, "Markup | None"]:
    """The figures that have something to show. With one policy there is nothing to draw by round."""
    from . import report_figures as draw  # imports matplotlib, half a second

    if not metrics:
        return {}
    every = [turn for turns in metrics.values() for turn in turns]
    scored, several = any(turn["score"] is not None for turn in every), len(metrics) > 1
    keys, parent, names = ("improved", "worsened"), "changes", ("better", "worse")
    if has_flips(metrics):
        keys, parent = ("wrong_to_right", "right_to_wrong"), "flips"
        names = tuple(key.replace("_", " ") for key in keys)
    changed = any(turn[parent] and any(turn[parent][key] for key in keys) for turn in every)
    kl = {r.number: r.metrics["kl_to_initial"] for r in run.evaluated if r.metrics.get("kl_to_initial")}
    moved = any(entry["per_answer"] for entry in kl.values())
    has_lengths = several and any(turn["tokens"] for turn in every)
    spread = shown_scores(run) if scored else {}
    selecting = {r.number: r.metrics["selecting"] for r in run.evaluated if "selecting" in r.metrics}
    return {
        "score_by_round": draw.score_by_round(metrics, label) if scored and several else None,
        "selecting_and_judging": draw.selecting_and_judging(metrics, selecting)
        if scored and len(selecting) > 1
        else None,
        "score_by_turn": draw.score_by_turn(metrics, label) if scored and run.turns > 1 else None,
        "histogram": draw.histogram(spread, "score") if spread else None,
        "flips": draw.flips(metrics, keys, parent, names) if changed else None,
        "lengths": draw.lengths(metrics) if has_lengths else None,
        "divergence": draw.divergence(kl) if moved and len(kl) > 1 else None,
    }


def shown_scores(run: RunRecord) -> dict[str, list[list[float | None]]]:
    """Scores by turn of the first and the last policy; nothing if they take so few values that means say it all."""
    policies = {round_.name: round_.scores for round_ in dict.fromkeys([run.evaluated[0], run.evaluated[-1]])}
    values = {score for scores in policies.values() for row in scores for score in row if score is not None}
    if len(values) <= 2:
        return {}
    return {name: [of_turn(scores, turn) for turn in range(1, run.turns + 1)] for name, scores in policies.items()}


def training_figures(run: RunRecord) -> list[tuple[str, "Markup"]]:
    """The curves of the rounds, and the SFT's loss."""
    from .report_figures import curves

    found = []
    for title, metrics in CURVES.items():
        segments = {metric: segments for metric in metrics if (segments := curve(run, metric))}
        if any(len(steps) > 1 for of_metric in segments.values() for _, steps, _ in of_metric):
            name = "curve-" + re.sub(r"\W+", "-", title.lower())
            found.append((title, curves(name, title, segments)))
    sft = curve(run, "loss", sft=True)
    if any(len(steps) > 1 for _, steps, _ in sft):
        found.append(("Loss of the SFT", curves("curve-sft", "Loss of the SFT", {"loss": sft})))
    return found
