"""
What a report says, as numbers and words. In: a run directory, whatever state the run is in. Nothing is drawn here.

A file that does not exist yet is `None`; a broken one is an error that names it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...recipe import RecipeError
from ..checks.gates import scores_lower
from ..config import EvaluationConfig
from ..data.records import read_json, read_jsonl
from ..run_dir import RoundDir, RunDir
from ..scoring.evaluation import Scores, both_scored, difference_interval, of_turn
from .cost import PEAKS, stage_times
from .state import RunState, read_state
from .tables import policy_name


# Metrics of a turn that version 0.1.0 did not write
LATER_KEYS = ("interval", "correct", "win_rate_round_0", "win_rate_previous", "changes", "flips", "token_quartiles")
LATER_KEYS += ("truncated_share", "distinct_1", "distinct_2", "similarity", "identical")

# Warn when this share of a turn's answers was cut off, or when direct answers grew by this factor. Our choice
MANY_CUT_OFF = 0.2
GROWTH = 1.5


class RoundRecord:
    """The files of one round, `None` for those that do not exist."""

    def __init__(self, files: RoundDir, number: int, name: str):
        self.files = files
        self.number = number
        self.name = name
        self.metrics = read_json(files.metrics)
        self.setback = read_json(files.setback)
        for turn in self.metrics["turns"] if self.metrics else ():
            turn.update({key: turn.get(key) for key in LATER_KEYS})
        self.sft_drops = read_json(files.sft_drops)
        self.drops = read_json(files.drops)
        self.health = read_json(files.health)
        self.guard = read_json(files.guard)
        self.rows = read_json(files.training / "rows.json")
        self.history = read_json(files.training / "log_history.json")
        self.cost = read_json(files.cost)
        self.manifest = read_json(files.manifest)

    @cached_property
    def scores(self) -> Scores:
        """Scores of the answers to the evaluation prompts."""
        return [row["scores"] for row in read_jsonl(self.files.evaluation_scores)]

    @cached_property
    def chains(self) -> list[dict[str, Any]]:
        """The answers to the evaluation prompts."""
        return read_jsonl(self.files.evaluation)


@dataclass
class RunRecord:
    """A run, as its directory has it."""

    path: Path
    resolved: dict[str, Any]
    recipe: str
    events: list[dict[str, Any]]
    rounds: list[RoundRecord]
    state: RunState

    @property
    def evaluated(self) -> list[RoundRecord]:
        return [round_ for round_ in self.rounds if round_.metrics is not None]

    def round(self, number: int) -> RoundRecord:
        return next(round_ for round_ in self.rounds if round_.number == number)

    @property
    def turns(self) -> int:
        return self.resolved["refinements"]["turns"]

    @property
    def judged(self) -> bool:
        """Whether a judge contributes to the scores, which then compare the answers of a chain rather than two policies."""
        scores = self.resolved["evaluation"].get("scores") or self.resolved["scores"]
        return any(scorer.get("judge") for scorer in scores.get("scorers") or [scores])

    @property
    def draw(self) -> dict[str, int]:
        """Arguments of the bootstrap; version 0.1.0 had no intervals."""
        samples = self.resolved["evaluation"].get("bootstrap_samples", EvaluationConfig.bootstrap_samples)
        return {"samples": samples, "seed": self.resolved["seed"]}

    def prompts(self) -> list[dict[str, Any]]:
        """The evaluation prompts, with their other columns."""
        return read_jsonl(RunDir(self.path).evaluation_prompts)


def read_run(path: Path, running: bool | None = None) -> RunRecord:
    """
    Args:
        path (`Path`):
            A run directory.
        running (`bool`, *optional*):
            Whether a process is running in it. Default: whether its lock is held.

    Raises:
        [`RecipeError`]: not a run directory.
    """
    run = RunDir(path)
    resolved = read_json(run.resolved)
    if resolved is None:
        raise RecipeError(
            f"{path} is not a run directory: it has no {run.resolved.name}. Name the `output_dir` of a run; `trl-ext aries list DIR` "
            "finds those under a directory."
        )
    rounds = [
        RoundRecord(run.round(number), number, policy_name(number, resolved["sft"] is not None))
        for number in range(resolved["rounds"] + 1)
        if run.round(number).path.exists()
    ]
    decide_right(rounds)
    return RunRecord(
        path=path,
        resolved=resolved,
        recipe=run.recipe.read_text(encoding="utf-8"),
        events=run.read_events(),
        rounds=rounds,
        state=read_state(run, resolved["rounds"], running),
    )


def decide_right(rounds: list[RoundRecord]) -> None:
    """Forget which answers are right if the rounds disagree on what right means: their counts would not be comparable."""
    metrics = [round_.metrics for round_ in rounds if round_.metrics is not None]
    if len({of_round.get("correct_score") for of_round in metrics}) > 1:
        for of_round in metrics:
            of_round["correct_score"] = None
            for turn in of_round["turns"]:
                turn |= {"correct": None, "flips": None}


# Did it get better?


@dataclass
class Change:
    """
    The mean difference of two answers' scores, prompt by prompt.

    Args:
        difference (`float`), interval (`list[float]`, *optional*), prompts (`int`):
            The mean, its 95 % interval, and over how many prompts.
    """

    difference: float
    interval: list[float] | None
    prompts: int

    @property
    def verdict(self) -> str:
        """`"higher"`, `"lower"`, `"no clear change"` if the interval contains 0, or `"unknown"` without an interval."""
        if self.interval is None:
            return "unknown"
        low, high = self.interval
        return "higher" if low > 0 else "lower" if high < 0 else "no clear change"


def change(before: Sequence[float | None], after: Sequence[float | None], samples: int, seed: int) -> Change | None:
    """`after − before` over the prompts that have both scores; `None` if there are none."""
    differences = [new - old for old, new in both_scored(list(before), list(after))]
    if not differences:
        return None
    mean = sum(differences) / len(differences)
    return Change(mean, difference_interval(differences, samples, seed), len(differences))


def changes(run: RunRecord) -> dict[str, Change | None]:
    """
    How the last evaluated policy changed: its direct answers compared with the first policy's (`direct`), its last refinements with the
    first policy's (`refined`), and its last refinements with its own direct answers (`refining`).
    """
    first, last = run.evaluated[0], run.evaluated[-1]
    draw, end, later = run.draw, run.turns, first is not last and not run.judged
    return {
        "direct": change(of_turn(first.scores, 1), of_turn(last.scores, 1), **draw) if later else None,
        "refined": change(of_turn(first.scores, end), of_turn(last.scores, end), **draw)
        if later and end > 1
        else None,
        "refining": change(of_turn(last.scores, 1), of_turn(last.scores, end), **draw) if end > 1 else None,
    }


def warnings(run: RunRecord) -> list[str]:
    """What a reader should know before trusting the figures."""
    found = [event["note"] for event in run.events if event["event"] == "note"]
    if run.judged:
        found.append(
            "A judge's score is an answer's win rate against the other answers of its chain and averages 1/2 over it: it "
            "compares turns, not rounds."
        )
    for round_ in run.rounds:
        decision = (round_.guard or {}).get("decision")
        if decision in ("skipped", "warned", "stopped"):
            done = {"skipped": "left untrained", "warned": "trained on anyway", "stopped": "the run stopped"}
            findings = round_.guard.get("findings") or []
            lower = scores_lower(round_.guard) or not findings
            why = ["the chosen answers did not score higher than the rejected ones"] * lower + findings
            found.append(f"Round {round_.number}: {'; '.join(why)}; {done[decision]}.")
    cut, missing = {}, {}
    for round_ in run.evaluated:
        turns = round_.metrics["turns"]
        cut[round_.name] = max(turn["truncated_share"] or 0.0 for turn in turns)
        missing[round_.name] = max(turn["answers"] - turn["scored"] for turn in turns)
    if many := [name for name, share in cut.items() if share >= MANY_CUT_OFF]:
        found.append(
            f"Up to {max(cut.values()):.0%} of a turn's answers were cut off by max_tokens ({', '.join(many)})."
        )
    if some := [name for name, count in missing.items() if count > 0]:
        most = max(missing.values())
        found.append(f"Up to {most:,} answers of a turn have no score and are left out ({', '.join(some)}).")
    if len(run.evaluated) > 1:
        first, last = (round_.metrics["turns"][0]["tokens"] for round_ in (run.evaluated[0], run.evaluated[-1]))
        if first and last and last > GROWTH * first:
            found.append(f"Direct answers grew from {first:.0f} to {last:.0f} tokens on average.")
    sets = {json.dumps(round_.manifest["versions"], sort_keys=True) for round_ in run.rounds if round_.manifest}
    if len(sets) > 1:
        found.append("Package versions changed between rounds; the versions below are those of the last one.")
    return found


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings by dotted keys, their values as text; empty sections included."""
    found = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return found


# What it took


def time_table(run: RunRecord) -> dict[str, Any]:
    """Seconds of each stage by round and its peak memory, in the order of their first start, and how many stages were interrupted."""
    by_stage: dict[str, dict[int, float]] = {}
    peaks: dict[str, dict[str, int]] = {}
    interrupted = 0
    for round_ in run.rounds:
        for stage in stage_times(run.events, round_.number):
            by_stage.setdefault(stage["stage"], {})[round_.number] = stage["seconds"]
            held = peaks.setdefault(stage["stage"], {})
            held |= {key: max(stage[key], held.get(key, 0)) for key in PEAKS if key in stage}
            interrupted += stage["interrupted"]
    if run.state.kind == "running" and run.state.in_stage:
        interrupted = max(0, interrupted - 1)  # one goes on, maybe in a round that has no directory yet
    total = sum(sum(seconds.values()) for seconds in by_stage.values())
    return {
        "stages": [
            {"name": name, "rounds": seconds, "total": sum(seconds.values()), "share": sum(seconds.values()) / total}
            | dict.fromkeys(PEAKS)
            | peaks[name]
            for name, seconds in by_stage.items()
            if total > 0
        ],
        "rounds": [round_.number for round_ in run.rounds],
        "peaks": [key for key in PEAKS if any(key in held for held in peaks.values())],
        "total": total,
        "interrupted": interrupted,
    }


def token_table(run: RunRecord) -> list[dict[str, Any]]:
    """
    For each round its generated tokens, and tokens per second of generation and training, `None` if they are not known. Answering round n's
    prompts includes the evaluation of round n − 1's policy, what was `discarded` if that was rolled back, and in the last round the
    evaluation of its own.
    """
    generated = {r.number: {"discarded": 0} | r.cost["generated_tokens"] for r in run.rounds if r.cost}
    rows = []
    for number, tokens in generated.items():
        stages = {stage["stage"]: stage for stage in stage_times(run.events, number)}
        stage = stages.get("drafts and refinements")
        answered = [
            tokens["drafts"],
            tokens["refinements"],
            tokens["discarded"],
            *(tokens["evaluation"] for _ in range(number == run.resolved["rounds"])),
        ]
        answered += [generated[number - 1]["evaluation"]] if number - 1 in generated else []
        known = stage is not None and not stage["interrupted"] and stage["seconds"] > 0 and number > 0
        history = {key: value for row in run.round(number).history or [] for key, value in row.items()}
        trained, seconds = history.get("num_tokens"), history.get("train_runtime")
        rows.append(
            {
                "name": run.round(number).name,
                **tokens,
                "generated_per_second": sum(answered) / stage["seconds"] if known else None,
                "trained_per_second": trained / seconds if trained and seconds else None,
            }
        )
    return rows


def drop_table(run: RunRecord) -> list[dict[str, Any]]:
    """For each reason why pairs were not made, its count by round; the most frequent reason first."""
    rounds = [round_ for round_ in run.rounds if round_.drops is not None]
    reasons = {reason for round_ in rounds for reason in round_.drops["dropped"]}
    rows = [
        {"reason": reason, "rounds": [round_.drops["dropped"].get(reason, 0) for round_ in rounds]}
        for reason in reasons
    ]
    return sorted(rows, key=lambda row: (-sum(row["rounds"]), row["reason"]))


def curve(run: RunRecord, metric: str, sft: bool = False) -> list[tuple[str, list[float], list[float]]]:
    """
    A logged metric of the training: for each round that has it, its name, the steps, counted on from round to round, and the values. The
    SFT is a curve of its own.
    """
    segments, offset = [], 0
    for round_ in run.rounds:
        if (round_.number == 0) != sft:
            continue
        rows = round_.history or []
        points = [(row["step"] + offset, row[metric]) for row in rows if metric in row]
        if points:
            steps, values = zip(*points, strict=True)
            segments.append((round_.name, list(steps), list(values)))
        offset += max((row["step"] for row in rows), default=0)
    return segments


def training_table(run: RunRecord) -> list[dict[str, Any]]:
    """For each training its rows and the last logged value of each metric."""
    rows = []
    for round_ in run.rounds:
        if round_.history:
            last = {key: value for row in round_.history for key, value in row.items()}
            rows.append({"name": "SFT" if round_.number == 0 else round_.name, "rows": round_.rows or {}, **last})
    return rows
