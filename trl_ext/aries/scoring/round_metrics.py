"""
The metrics of a round, from its files and those of the rounds before it, and what somebody should know of them.

In: answers to the evaluation prompts and their scores. Out: what `metrics.json` holds, and lines to say.
"""

from pathlib import Path
from typing import Any

from ..config import AriesConfig
from ..data.records import read_json, read_jsonl
from ..policies import base_round
from ..run_dir import RunDir
from .evaluation import Scores, ceiling, evaluation_metrics, partings, selecting_metrics, setbacks
from .scores import load_chains


def round_metrics(run: RunDir, config: AriesConfig, number: int) -> dict[str, Any]:
    """
    What [`~aries.scoring.evaluation.evaluation_metrics`] has by the scores that judge, with `kl_to_initial` and, if others select,
    [`~aries.scoring.evaluation.selecting_metrics`]. The round before is the one whose policy this one's was trained from.
    """
    round_dir = run.round(number)
    chains = load_chains(read_jsonl(run.evaluation_prompts), round_dir.evaluation)
    before = [run.round(n) for n in (0, base_round(run, number))] if number > 0 else []
    initial, previous = [read_scores(earlier.evaluation_scores) for earlier in before] or (None, None)
    last = read_json(run.round(number - 1).metrics) or {}
    draw = {"bootstrap_samples": config.evaluation.bootstrap_samples, "seed": config.seed}
    metrics = evaluation_metrics(
        chains,
        read_scores(round_dir.evaluation_scores),
        config.refinements.turns,
        initial=initial,
        previous=previous,
        binary=last.get("correct_score", 1.0) is not None,
        correct_score=config.evaluation.correct_score,
        **draw,
    )
    if round_dir.selecting_scores.exists():
        initial, previous = [read_scores(earlier.selecting_scores) for earlier in before] or (None, None)
        scores = read_scores(round_dir.selecting_scores)
        metrics["selecting"] = selecting_metrics(scores, config.refinements.turns, initial, previous, **draw)
    return metrics | {"kl_to_initial": (read_json(round_dir.parity) or {}).get("kl_to_initial")}


def round_setbacks(config: AriesConfig, metrics: dict[str, Any]) -> list[str]:
    """[`~aries.scoring.evaluation.setbacks`], which a judge's scores cannot show: they compare turns, not rounds."""
    return setbacks(metrics) if config.compares_rounds else []


def round_warnings(run: RunDir, config: AriesConfig, number: int, metrics: dict[str, Any]) -> list[str]:
    """What else to say of a round: its policy is at the ceiling before any training, or the scores that select part from those that judge."""
    found = []
    if number == 0 and (at_ceiling := ceiling(metrics, read_scores(run.round(0).evaluation_scores))):
        found.append(at_ceiling)
    if config.compares_rounds and all(scorer.judge is None for scorer in config.scorers["scores"]):
        found += partings(metrics)
    return found


def read_scores(path: Path) -> Scores:
    """The scores of the answers to the evaluation prompts, in the order of the prompts."""
    return [row["scores"] for row in read_jsonl(path)]
