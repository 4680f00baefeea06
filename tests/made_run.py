"""
A run directory as the loop leaves it, without its models: written by the package's own writers, from the answers and scores that
a test gives.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Template

from trl_ext.aries.checks.gates import PairsMeasure
from trl_ext.aries.checks.overlap import count_overlap
from trl_ext.aries.config import AriesConfig, PairsConfig
from trl_ext.aries.data.pairs import Pair, preference_rows
from trl_ext.aries.data.records import Answer, Chain, write_json, write_jsonl
from trl_ext.aries.results.cost import round_cost
from trl_ext.aries.run_dir import RunDir
from trl_ext.aries.scoring.evaluation import evaluation_metrics
from trl_ext.recipe import Recipe, parse_section


VERSIONS = {"trl-ext": "0.1.0", "trl": "1.16.0"}


def make_run(
    path: Path,
    texts: list[list[list[str]]],
    scores: list[list[list[float | None]]],
    *,
    rounds: int | None = None,
    prompt: str = "How are you?",
    columns: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
) -> RunDir:
    """
    Args:
        path (`Path`):
            Where.
        texts, scores (lists of `[evaluated rounds][prompts][turns]`):
            Answers to the evaluation prompts, and their scores.
        rounds (`int`, *optional*):
            Rounds of the recipe; by default the run is finished.
        prompt (`str`), columns (`dict`, *optional*):
            The evaluation prompts' text, with their number behind it, and other columns.
        settings (`dict`, *optional*):
            More of the recipe.
    """
    run = RunDir(path)
    last = len(texts) - 1
    turns = len(texts[0][0])
    recipe = {
        "output_dir": str(path),
        "rounds": last if rounds is None else rounds,
        "model": {"model_name_or_path": "some/model", "use_peft": True},
        "prompts": {"dataset": "train.jsonl"},
        "scores": {"verifier": "verifier.py:score"},
        "refinements": {"turns": turns},
        "training": {"trainer": "tdpo"},
        "evaluation": {"dataset": "eval.jsonl", "bootstrap_samples": 200},
        **(settings or {}),
    }
    config = parse_section(Recipe(None, recipe, {}), AriesConfig)
    with run.opened(config, json.dumps(recipe), {"evaluation.dataset": "abc123"}):
        write_json(run.overlap, count_overlap([], [], []))
    count = len(texts[0])
    prompts = [
        {"prompt_id": f"eval-{i}", "prompt": [{"role": "user", "content": f"{prompt} {i}"}], **(columns or {})}
        for i in range(count)
    ]
    write_jsonl(run.evaluation_prompts, prompts)
    for number in range(last + 1):
        files = run.round(number)
        files.training.mkdir(parents=True)
        if number > 0:
            pair_files(run, number, prompts[0]["prompt"], texts[number][0])
        chains = [
            Chain(
                row["prompt_id"], row["prompt"], [Answer(k, t, len(t.split()), "stop") for k, t in enumerate(texts, 1)]
            )
            for row, texts in zip(prompts, texts[number], strict=True)
        ]
        write_jsonl(files.evaluation, (chain.to_row() for chain in chains))
        rows = zip(prompts, scores[number], strict=True)
        write_jsonl(files.evaluation_scores, ({"prompt_id": p["prompt_id"], "scores": s} for p, s in rows))
        earlier = {"initial": scores[0], "previous": scores[number - 1]} if number else {}
        metrics = evaluation_metrics(chains, scores[number], turns, **earlier, bootstrap_samples=200)
        kl = {"per_answer": 0.5 * number, "standard_error": 0.1, "per_token": 0.1, "answers": 8}
        write_json(files.metrics, metrics | {"kl_to_initial": kl})
        write_json(files.cost, round_cost(run.read_events(), number, [], chains))
        manifest = {
            "round": number,
            "policy": {"model": "some/model", "adapter": str(files.adapter)},
            "versions": VERSIONS,
            "python": "3.11",
            "machine": "Linux",
            "commit": {"sha": "0123456789", "dirty": False},
            "sha256": {"metrics.json": "fedcba"},
        }
        write_json(files.manifest, manifest)
    return run


def measure_pairs(pairs: Iterable[Pair]) -> dict[str, Any]:
    """What the guard measures of these pairs."""
    measure = PairsMeasure()
    for pair in pairs:
        measure.add(pair)
    return measure.measured()


def pair_files(run: RunDir, number: int, prompt: Any, texts: list[str]) -> None:
    """
    What a round leaves of its pairs and its training: 10 chains, 7 pairs, 3 steps; and its events. The pairs have one prompt's texts, the last over
    the first.
    """
    files = run.round(number)
    answers = [Answer(turn, text, len(text.split()), "stop") for turn, text in enumerate(texts, 1)]
    pairs = [Pair(Chain(f"train-{i}", prompt, answers), answers[-1], answers[0], 0.9, 0.2) for i in range(7)]
    template = Template("{{ question }} Draft: {{ draft }}")
    write_jsonl(files.pairs, (row for pair in pairs for row in preference_rows(pair, template, PairsConfig())))
    write_json(files.drops, {"chains": 10, "pairs": 7, "dropped": {"no_margin": 2, "all_answers_truncated": 1}})
    guard = {"compared": 7, "chosen_score": 0.9, "rejected_score": 0.2, "difference": 0.7, "interval": [0.5, 0.8]}
    write_json(files.guard, {"decision": "trained", **guard, "length_ratio": 1.1})
    write_json(files.training / "rows.json", {"rows": 21, "trained_rows": 20})
    steps = [{"loss": 0.7 - step / 10, "rewards/margins": step / 2, "step": step} for step in (1, 2, 3)]
    write_json(files.training / "log_history.json", [*steps, {"train_loss": 0.5, "step": 3}])
    for stage, seconds in (("drafts and refinements", 60.0), ("training (tdpo)", 30.0)):
        run.log_event(event="start", round=number, stage=stage)
        run.log_event(event="end", round=number, stage=stage, seconds=seconds)
