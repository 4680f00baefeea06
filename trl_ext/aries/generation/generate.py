"""
Generation: a policy's answers to the evaluation prompts and to the next round's, with one start of the engine.

In: files of prompts. Out: a file of answers for each (`chains.py`), and samples with their log-probabilities for the parity check. The
engine is embedded vLLM, vLLM servers, or embedded vLLM in the workers of a Ray cluster.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...recipe import RecipeError
from ..children import Reporter
from ..config import AriesConfig, DraftsConfig, sampling_by_turn
from ..data.records import read_jsonl, read_rows, write_jsonl
from ..policies import Answers, answering_round, answers_of, needs_samples, policy_after
from ..run_dir import RunDir
from .chains import EngineSettings, Task, TaskEngine, answer_task
from .intake import Intake
from .refinements import Strategy


# vLLM accepts these as the largest LoRA rank
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass
class ParitySamples:
    """Samples for the parity check: answers to the first `count` prompts of a file."""

    prompts: Path
    output: Path
    count: int
    sampling: DraftsConfig
    seed: tuple[Any, ...]


def generate(run: RunDir, config: AriesConfig, answering: int, report: Reporter) -> None:
    """What is missing from the answers of round `answering`'s policy, and from its samples for the parity check."""
    tasks = [
        make_task(config, answers, answering, report)
        for answers in answers_of(run, config, answering)
        if not answers.answers.exists()
    ]
    own, parity = run.round(answering), None
    if needs_samples(run, config, answering):
        seed = (config.seed, "parity")
        parity = ParitySamples(run.evaluation_prompts, own.samples, config.parity.samples, config.drafts, seed)
    source = answering_round(run, answering)
    policy = policy_after(run, config, source)
    settings = EngineSettings(
        model=policy.model,
        config=config.generation,
        # A new name and id for every round: vLLM may answer from stale weights under an old one
        adapter=None if policy.adapter is None else (f"round_{source:02d}", source + 1, policy.adapter),
        max_lora_rank=next(rank for rank in LORA_RANKS if rank >= config.model.get("lora_r", 16)),
        revision=config.model.get("model_revision"),
        trust_remote_code=config.trust_remote_code,
    )
    answer_tasks(settings, tasks, parity, run.round(source).probe, report)


def make_task(config: AriesConfig, answers: Answers, answering: int, report: Reporter) -> Task:
    """The evaluation prompts have the same seeds in every round, and a temperature of their own."""
    sampling, seed = sampling_by_turn(config), (config.seed, answering + 1)
    if answers.is_evaluation:
        seed = (config.seed, "evaluation")
        sampling = [replace(turn, temperature=config.evaluation.temperature) for turn in sampling]
    tell = note_finding(report) if answers.is_evaluation else stop
    return Task(
        answers.prompts,
        answers.answers,
        Strategy(config.refinements, config.generation.answer_pattern, config.pairs.learn),
        sampling,
        seed,
        Intake(config.health, config.pairs.selection, sampling[0], tell),
    )


def stop(finding: str) -> None:
    """End the round if too many answers cannot be used."""
    raise RecipeError(
        f"generation is stopped: {finding} Do so under another `output_dir`. To go on with these answers, add `--health.max_dropped 0.9`."
    )


def note_finding(report: Reporter) -> Callable[[str], None]:
    """Only note it, since such answers are a result of an evaluation."""
    return lambda finding: report.note(f"evaluation: {finding}")


def answer_tasks(
    settings: EngineSettings, tasks: list[Task], parity: ParitySamples | None, probe: Path, report: Reporter
) -> None:
    """
    Args:
        settings ([`~aries.generation.chains.EngineSettings`]):
            The policy, and how the engine is started.
        tasks (`list[Task]`), parity ([`ParitySamples`], *optional*):
            What it answers.
        probe (`Path`):
            What servers must agree with, if the recipe names some.
        report ([`~aries.children.Reporter`]):
            Told of finished chains, and of what becomes of servers and workers.
    """
    sizes = [sum(1 for _ in read_rows(task.prompts)) for task in tasks]
    with closing(start_engine(settings, probe, report)) as engine:
        report(0, sum(sizes))
        # First, so that the batch, and with it the rounding, is the same in a run that continues
        if parity is not None:
            prompts = read_jsonl(parity.prompts)[: parity.count]
            write_jsonl(parity.output, engine.sample_logps(prompts, parity.sampling, parity.seed))
        for i, task in enumerate(tasks):
            answer_task(engine, task, lambda done, i=i: report(sum(sizes[:i]) + done, sum(sizes)))


def start_engine(settings: EngineSettings, probe: Path, report: Reporter) -> TaskEngine:
    if settings.config.base_urls is not None:
        from .served_engine import ServedEngine  # an HTTP client, which the others do not need

        return ServedEngine(settings, probe, report.note)
    if settings.config.engine == "ray":
        from .ray_engine import RayEngine

        return RayEngine(settings, report.note)
    from .embedded_engine import EmbeddedEngine

    return EmbeddedEngine(settings)
