"""
Makes the rows that a round trains on, and checks them before their file gets its name.

In: the round's chains and scores. Out: `pairs.jsonl`, what was dropped (`drops.json`), and what the guard has found (`guard.json`).
"""

from collections.abc import Iterator
from typing import Any

from jinja2 import Template

from ...recipe import RecipeError
from ..config import AriesConfig
from ..data.faults import FAULTS, share_finding
from ..data.pairs import Selection, preference_rows, rule_evidence
from ..data.records import read_json, read_jsonl, read_rows, write_json, write_jsonl
from ..run_dir import RoundDir, RunDir
from ..scoring.scores import read_chains
from .gates import PairsMeasure, decide, rule_findings


def write_pairs(round_dir: RoundDir, config: AriesConfig, number: int, template: Template) -> tuple[int, Selection]:
    """
    Returns:
        `tuple`: how many rows there are, and the pairs that they are made of, counted.

    Raises:
        [`RecipeError`]: there are no pairs, or too many chains had faults.
    """
    # Read from the files when they are needed
    chains = (chain for _, chain in read_chains(round_dir.prompts, round_dir.answers))
    scores = (row["scores"] for row in read_rows(round_dir.scores))
    selection = Selection(zip(chains, scores, strict=True), config.pairs)
    return write_jsonl(round_dir.pairs, checked_rows(round_dir, config, number, selection, template)), selection


def checked_rows(
    round_dir: RoundDir, config: AriesConfig, number: int, selection: Selection, template: Template
) -> Iterator[dict[str, Any]]:
    """Yield the rows; after the last one, write and judge the counts."""
    judged = (
        {row["prompt_id"]: row["scores"] for row in read_jsonl(round_dir.guard_scores)}
        if round_dir.guard_scores.exists()
        else None
    )
    measure = PairsMeasure(judged)
    for pair in selection:
        measure.add(pair)
        yield from preference_rows(pair, template, config.pairs)
    chains, dropped = selection.chains, selection.dropped
    write_json(round_dir.drops, {"chains": chains, "pairs": selection.pairs, "dropped": dropped})
    faults = {reason: count for reason, count in dropped.items() if reason in FAULTS}
    finding = share_finding("possible pairs", faults, chains * config.pairs.pairs_per_prompt, config.health)
    if finding:
        raise RecipeError(
            f"round {number} would train on what is left: {finding}. Look at {round_dir.answers} and {round_dir.scores}, and "
            "at the reasons in docs/aries.md (Selection). To train on the rest, type the same command with `--health.max_dropped 0.9`."
        )
    if not selection.pairs:
        raise RecipeError(
            f"round {number} has no pairs to train on: all {chains} chains were dropped, {dropped}. Look at "
            f"{round_dir.answers} and {round_dir.scores}; a higher temperature or a finer score gives more pairs "
            "(under another `output_dir`)."
        )
    measured = measure.measured()
    by_construction = config.pairs.selection == "best_over_worst" and judged is None
    if config.pairs.selection == "rule_based":
        evidence = rule_evidence(chains, dropped)
        first = read_json(RunDir(round_dir.path.parent).round(1).guard) if number > 1 else None
        measured |= {"rule": evidence, "findings": rule_findings(evidence, first and first["rule"], config.pairs)}
    decision, by = decide(measured, config.pairs.guard), "scores" if judged is None else config.judging
    write_json(round_dir.guard, {"decision": decision, "by": by, "by_construction": by_construction, **measured})
