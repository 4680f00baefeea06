"""
Two runs side by side: scores by round and turn, what was set otherwise, and what they cost.

A difference has an interval over prompts, paired, where both runs answered the same evaluation prompts and the same
scorers judged them. Where they did not, no difference is shown, and the reason is.
"""

import json
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ..scoring.evaluation import of_turn
from .progress import RunProgress, duration, interval_line
from .report_data import Change, RoundRecord, RunRecord, change, flat, read_run, time_table


# Always another
PLACES = {"output_dir"}


def compare(path_a: Path, path_b: Path) -> int:
    """
    `trl-ext aries compare`: print the comparison.

    Returns:
        `int`: exit code, 0.

    Raises:
        [`RecipeError`]: one is no run directory.
    """
    a, b = read_run(path_a), read_run(path_b)
    progress = RunProgress(0)
    for name, run in (("A", a), ("B", b)):
        progress.say(f"{name}: {run.path}, {run.state}")
    obstacle = not_comparable(a, b)
    progress.say("")
    if not (a.evaluated or b.evaluated):
        progress.say("No round of either has been evaluated: there are no scores.")
    else:
        progress.show(score_table(a, b, paired=obstacle is None))
        progress.say(obstacle or f"B − A is paired over the {len(a.prompts()):,} prompts, with its 95 % interval.")
    progress.say("")
    for table in (settings_table(a, b), cost_table(a, b)):
        progress.show(table)
    return 0


def not_comparable(a: RunRecord, b: RunRecord) -> str | None:
    """Why a difference of the scores would mean nothing; `None` where it does."""
    if not (a.evaluated and b.evaluated):
        return "One of them has not been evaluated yet, so there are no differences."
    if a.judged or b.judged:
        return "A judge's scores compare the answers of a chain, not those of two runs, so no differences are shown."
    prompts = [
        [
            json.dumps({key: value for key, value in row.items() if key != "prompt_id"}, sort_keys=True)
            for row in run.prompts()
        ]
        for run in (a, b)
    ]
    if prompts[0] != prompts[1]:
        common = len(set(prompts[0]) & set(prompts[1]))
        return (
            f"The evaluation prompts are not the same (A has {len(prompts[0]):,}, B {len(prompts[1]):,}, {common:,} in common), "
            "so no differences are shown: give both runs the same `evaluation.dataset` and `evaluation.samples`."
        )
    if scorers(a) != scorers(b):
        return "The scorers are not the same, so no differences are shown: their scores are on different scales."
    return None


def scorers(run: RunRecord) -> Any:
    """Who scores, verifiers by their content."""
    files = {key: value for key, value in run.resolved["inputs"].items() if key.startswith("scores.")}
    return run.resolved["scores"] | files


def score_table(a: RunRecord, b: RunRecord, paired: bool) -> Table:
    """Rounds down, with A, B and B − A each; turns across."""
    turns = min(a.turns, b.turns)
    table = Table(title="Mean score on the evaluation prompts", title_justify="left", show_lines=True)
    table.add_column("policy")
    for turn in range(1, turns + 1):
        table.add_column(f"y{turn}" + (" (direct)" if turn == 1 else ""), justify="right")
    by_number = [{round_.number: round_ for round_ in run.evaluated} for run in (a, b)]
    for number in sorted(by_number[0].keys() | by_number[1].keys()):
        first, second = (rounds.get(number) for rounds in by_number)
        cells = []
        for turn in range(1, turns + 1):
            found = None
            if paired and first and second:
                found = change(of_turn(first.scores, turn), of_turn(second.scores, turn), **a.draw)
            cells.append(
                f"{score_of(first, turn)}\n{score_of(second, turn)}" + (change_lines(found) if paired else "")
            )
        name = "before round 1" if number == 0 else f"round {number}"
        table.add_row(f"{name}, A\nB" + ("\nB − A" if paired else ""), *cells)
    return table


def score_of(round_: RoundRecord | None, turn: int) -> str:
    score = None if round_ is None else round_.metrics["turns"][turn - 1]["score"]
    return "-" if score is None else f"{score:.3f}"


def change_lines(found: Change | None) -> str:
    return "\n-" if found is None else f"\n{found.difference:+.3f}{interval_line(found.interval)}"


def settings_table(a: RunRecord, b: RunRecord) -> Table:
    """Settings, inputs and package versions that differ."""
    table = Table(title="What differs", title_justify="left")
    for name in ("setting", "A", "B"):
        table.add_column(name, overflow="fold")
    settings = [flat(run.resolved | {"versions": versions(run)}) for run in (a, b)]
    for key in sorted((settings[0].keys() | settings[1].keys()) - PLACES):
        values = [of_run.get(key, "-") for of_run in settings]
        if values[0] != values[1]:
            table.add_row(*(Text(text) for text in (key, *map(shown, values))))
    if not table.rows:
        table.add_row("nothing", "", "")
    return table


def versions(run: RunRecord) -> dict[str, str]:
    """Of the packages, when the last round was closed."""
    manifests = [round_.manifest for round_ in run.rounds if round_.manifest]
    return manifests[-1]["versions"] if manifests else {}


def shown(text: str) -> str:
    """A setting; of a long one, such as a hash, the ends."""
    return text if len(text) <= 60 else f"{text[:24]}…{text[-24:]}"


def cost_table(a: RunRecord, b: RunRecord) -> Table:
    """Time by stage and generated tokens, all rounds together."""
    table = Table(title="Cost, all rounds", title_justify="left")
    table.add_column("")
    for name in ("A", "B"):
        table.add_column(name, justify="right")
    times = [time_table(run) for run in (a, b)]
    by_name = [{stage["name"]: stage["total"] for stage in of_run["stages"]} for of_run in times]
    for stage in dict.fromkeys([*by_name[0], *by_name[1]]):
        table.add_row(stage, *(duration(of_run[stage]) if stage in of_run else "-" for of_run in by_name))
    table.add_row("all stages", *(duration(of_run["total"]) for of_run in times), style="bold")
    if any(of_run["interrupted"] for of_run in times):
        table.add_row("stages cut short, their time unknown", *(str(of_run["interrupted"]) for of_run in times))
    for key in ("drafts", "refinements", "evaluation"):
        table.add_row(f"tokens of {key}", *(f"{tokens(run, key):,}" for run in (a, b)))
    return table


def tokens(run: RunRecord, key: str) -> int:
    return sum(round_.cost["generated_tokens"][key] for round_ in run.rounds if round_.cost)
