"""
Runs side by side: scores by round and turn, what was set differently, and what they cost; in a terminal or as a page.

Each run is compared with the first. A difference has a paired interval over prompts, and is shown only if both runs answered the same
evaluation prompts and were scored by the same scorers. Otherwise the reason is shown in its place.
"""

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ...recipe import RecipeError
from ..config import ScoresConfig
from ..run_dir import with_defaults
from ..scoring.evaluation import of_turn
from .pages import write_page
from .progress import RunProgress, duration
from .report_data import Change, RunRecord, change, flat, read_run, time_table
from .tables import interval_line


# Settings that differ between any two runs
PLACES = {"output_dir"}
# Settings of a scorer that change no score
HOW_ASKED = ("timeout", "batch_size")
MOST_RUNS = len(string.ascii_uppercase)


@dataclass
class Column:
    """A run in a comparison: its letter, and why its scores cannot be compared with the first run's, if they cannot."""

    letter: str
    run: RunRecord
    obstacle: str | None

    def turn(self, number: int, turn: int) -> dict[str, Any] | None:
        """The metrics of one turn of a round, if there are any."""
        for round_ in self.run.evaluated:
            if round_.number == number and turn <= self.run.turns:
                return round_.metrics["turns"][turn - 1]
        return None


def compare(paths: Sequence[Path], output: Path | None = None) -> int:
    """
    `trl-ext aries compare`: print the comparison, and write it as a page if `output` is given.

    Returns:
        `int`: exit code, 0.

    Raises:
        [`RecipeError`]: fewer than two runs or too many, or one is not a run directory.
    """
    if not 2 <= len(paths) <= MOST_RUNS:
        raise RecipeError(f"`aries compare` needs 2 to {MOST_RUNS} runs; got {len(paths)}.")
    runs = [read_run(path) for path in paths]
    obstacles = [None, *(obstacle(runs[0], run) for run in runs[1:])]
    columns = [Column(*each) for each in zip(string.ascii_uppercase, runs, obstacles, strict=False)]
    say, show = (progress := RunProgress(0)).say, progress.show
    for column in columns:
        say(f"{column.letter}: {column.run.path}, {column.run.state}")
    scores, settings, costs = score_rows(columns), setting_rows(runs), cost_rows(runs)
    say("")
    if scores:
        show(score_table(columns, scores))
        for line in remarks(columns):
            say(line)
    else:
        say("None of them has an evaluated round yet, so there are no scores.")
    say("")
    for title, rows in (("What differs", settings), ("Cost, all rounds", costs)):
        show(run_table(title, columns, rows))
    if output is not None:
        values = {"columns": columns, "scores": scores, "remarks": remarks(columns), "settings": settings}
        page = write_page(output, "compare.html.jinja", **values, costs=costs, figures=figures(columns))
        say(f"Written to {page}.")
    return 0


def obstacle(first: RunRecord, other: RunRecord) -> str | None:
    """Why the difference of two runs' scores would mean nothing; `None` if it means something."""
    if not (first.evaluated and other.evaluated):
        return "one of them has not been evaluated yet."
    if first.judged or other.judged:
        return "a judge's scores compare the answers of a chain, not those of two runs."
    prompts = [
        [json.dumps(row | {"prompt_id": None}, sort_keys=True) for row in run.prompts()] for run in (first, other)
    ]
    if prompts[0] != prompts[1]:
        common = len(set(prompts[0]) & set(prompts[1]))
        return (
            f"the evaluation prompts differ ({len(prompts[0]):,} and {len(prompts[1]):,}, {common:,} in common). Give both runs the same "
            "`evaluation.dataset` and `evaluation.samples`."
        )
    if scorers(first) != scorers(other):
        return "the scorers differ, and so do the scales of their scores."
    return None


def scorers(run: RunRecord) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """What the settings of the scorers say about their scores, and the hashes of verifiers."""
    judging = run.resolved["evaluation"].get("scores")
    section = "evaluation.scores." if judging else "scores."
    hashes = {
        key.removeprefix(section): value for key, value in run.resolved["inputs"].items() if key.startswith(section)
    }
    scores = with_defaults(judging or run.resolved["scores"], ScoresConfig)
    each = [{k: v for k, v in one.items() if k not in HOW_ASKED} for one in scores["scorers"] or [scores]]
    return each, hashes


def remarks(columns: list[Column]) -> list[str]:
    """Lines that explain the differences, or why there are none."""
    first, compared = columns[0], [column.letter for column in columns[1:] if column.obstacle is None]
    lines = [
        f"{column.letter} is not compared with A: {column.obstacle}"
        for column in columns
        if column.obstacle is not None
    ]
    if compared:
        shown = ", ".join(f"{letter} − A" for letter in compared)
        prompts = f"{len(first.run.prompts()):,} prompts"
        of = (
            f"those of the {prompts} that have both scores"
            if any(map(is_scored_in_part, columns))
            else f"the {prompts}"
        )
        lines.append(f"{shown}: paired over {of}, with 95 % intervals.")
    return lines


def is_scored_in_part(column: Column) -> bool:
    evaluated = (round_.metrics for round_ in column.run.evaluated)
    return any(turn["scored"] < metrics["prompts"] for metrics in evaluated for turn in metrics["turns"])


def score_rows(columns: list[Column]) -> list[dict[str, Any]]:
    """For each evaluated round its `name`, `scores` (a list by turn for each run) and `changes` (the same, compared with the first run)."""
    rounds = {round_.number: round_.name for column in columns for round_ in column.run.evaluated}
    rows = []
    for number in sorted(rounds):
        scores, changes = [], []
        for column in columns:
            found = [column.turn(number, turn) for turn in range(1, shared_turns(columns) + 1)]
            scores.append([metrics and metrics["score"] for metrics in found])
            if column is not columns[0] and column.obstacle is None:
                changes.append((column.letter, round_changes(columns[0].run, column.run, number, len(found))))
        rows.append(
            {"name": "before round 1" if number == 0 else rounds[number], "scores": scores, "changes": changes}
        )
    return rows


def shared_turns(columns: list[Column]) -> int:
    return min(column.run.turns for column in columns)


def round_changes(first: RunRecord, other: RunRecord, number: int, turns: int) -> list[Change | None]:
    """How far the second run's scores of a round are from the first one's, by turn."""
    rounds = [next((r for r in run.evaluated if r.number == number), None) for run in (first, other)]
    if None in rounds:
        return [None] * turns
    before, after = (round_.scores for round_ in rounds)
    return [change(of_turn(before, turn), of_turn(after, turn), **first.draw) for turn in range(1, turns + 1)]


def score_table(columns: list[Column], rows: list[dict[str, Any]]) -> Table:
    """A table: rounds down, in each the runs and their differences; turns across."""
    table = Table(title="Mean score on the evaluation prompts", title_justify="left", show_lines=True)
    table.add_column("policy")
    for turn in range(1, shared_turns(columns) + 1):
        table.add_column(f"y{turn}" + (" (direct)" if turn == 1 else ""), justify="right")
    for row in rows:
        names = [column.letter for column in columns]
        cells = [[shown_score(score) for score in scores] for scores in row["scores"]]
        for letter, changes in row["changes"]:
            names.append(f"{letter} − A" + "\n" * any(found and found.interval for found in changes))
            cells.append([shown_change(found) for found in changes])
        table.add_row(f"{row['name']}, " + "\n".join(names).rstrip("\n"), *map("\n".join, zip(*cells, strict=True)))
    return table


def shown_score(score: float | None) -> str:
    return "-" if score is None else f"{score:.3f}"


def shown_change(found: Change | None) -> str:
    return "-" if found is None else f"{found.difference:+.3f}{interval_line(found.interval)}"


def run_table(title: str, columns: list[Column], rows: dict[str, list[str]]) -> Table:
    """Rows with one text for each run."""
    table = Table(title=title, title_justify="left")
    for name in ("", *(column.letter for column in columns)):
        table.add_column(name, overflow="fold")
    for name, values in rows.items():
        table.add_row(*map(Text, (name, *values)))
    return table


def setting_rows(runs: list[RunRecord]) -> dict[str, list[str]]:
    """Settings, hashes of inputs and package versions that are not the same in all runs."""
    settings = [flat(run.resolved | {"versions": versions(run)}) for run in runs]
    rows = {
        key: [shortened(of_run.get(key, "-")) for of_run in settings]
        for key in sorted(set().union(*settings) - PLACES)
        if len({of_run.get(key) for of_run in settings}) > 1
    }
    return rows or {"nothing": [""] * len(runs)}


def versions(run: RunRecord) -> dict[str, str]:
    """The packages that were installed when the last round was closed."""
    manifests = [round_.manifest for round_ in run.rounds if round_.manifest]
    return manifests[-1]["versions"] if manifests else {}


def shortened(text: str) -> str:
    """A setting, without the middle of a long one such as a hash."""
    return text if len(text) <= 60 else f"{text[:24]}…{text[-24:]}"


def cost_rows(runs: list[RunRecord]) -> dict[str, list[str]]:
    """Time by stage and generated tokens, for all rounds together."""
    times = [time_table(run) for run in runs]
    by_stage = [{stage["name"]: stage["total"] for stage in of_run["stages"]} for of_run in times]
    rows = {
        stage: [duration(of_run[stage]) if stage in of_run else "-" for of_run in by_stage]
        for stage in dict.fromkeys(stage for of_run in by_stage for stage in of_run)
    }
    rows["all stages"] = [duration(of_run["total"]) for of_run in times]
    if any(of_run["interrupted"] for of_run in times):
        rows["interrupted stages, not timed"] = [str(of_run["interrupted"]) for of_run in times]
    for kind, row in (
        ("drafts", "tokens of drafts"),
        ("refinements", "tokens of refinements"),
        ("evaluation", "tokens of evaluation"),
        ("discarded", "tokens discarded by rolling back"),
    ):
        counts = [sum(r.cost["generated_tokens"].get(kind, 0) for r in run.rounds if r.cost) for run in runs]
        if kind != "discarded" or any(counts):
            rows[row] = [f"{count:,}" for count in counts]
    return rows


def figures(columns: list[Column]) -> list[tuple[str, Any]]:
    """Scores by round, a line for each run: of the direct answers, and of the last refinement. Left out without matplotlib."""
    if find_spec("matplotlib") is None:
        return []
    from .report_figures import score_by_run

    turns = dict.fromkeys((1, shared_turns(columns)))
    lines = {
        turn: {
            column.letter: [(r.number, r.metrics["turns"][turn - 1]) for r in column.run.evaluated]
            for column in columns
            if column.run.evaluated
        }
        for turn in turns
    }
    return [(turn, score_by_run(turn, of_turn)) for turn, of_turn in lines.items() if of_turn]
