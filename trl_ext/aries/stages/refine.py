"""Refinement by itself, step by step: what servers have to agree with, the answers, and their scores."""

from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import AutoTokenizer

from ...model_files import load_problem
from ...recipe import RecipeError
from ..children import Reporter, child_main
from ..config import RefineConfig, sampling_by_turn
from ..data.records import read_json, read_rows
from ..generation.chains import EngineSettings, Task
from ..generation.generate import LORA_RANKS, answer_tasks
from ..generation.intake import Intake
from ..generation.refinements import Strategy
from ..policies import Comparison, Policy
from ..results.refine import ADAPTER_CONFIG
from ..results.work_dir import RefineMessage, WorkDir
from ..scoring.reward_model import RewardModel, check_reward_model
from ..scoring.scores import ScoreCache, Scorer, ScoreTask, each_form
from ..scoring.scoring import Tokenizer, check_scorers, make_scorers, score_files, with_absolute_paths
from ..scoring.watch import Watch


def main(message: RefineMessage, report: Reporter) -> None:
    work = WorkDir(message.work)
    config = work.read_config()
    match message.step:
        case "check":
            check(work, config)
        case "probe":
            probe(work, config)
        case "answers":
            answer(work, config, report)
        case "reward_model":
            score_by_reward_model(work, config, message.name, report)
        case "scores":
            score(work, config, report)


def probe(work: WorkDir, config: RefineConfig) -> None:
    from ..checks.probe import write_probe  # torch, and for a while the model

    base = config.model.model_name_or_path
    policies = {"policy": Policy(base, local_adapter(config))}
    if config.adapter is not None:
        policies["base"] = Policy(base, None)
    comparison = Comparison(
        0,
        policies,
        quantization=config.generation.quantization,
        revision=config.model.model_revision,
        trust_remote_code=config.trust_remote_code,
    )
    write_probe(comparison, work.prompts, work.probe, config.generation.dtype, config.generation.max_model_len)


def answer(work: WorkDir, config: RefineConfig, report: Reporter) -> None:
    check_prompts(work, config, report)
    adapter, rank = local_adapter(config), 16
    if adapter is not None:
        lora = read_json(Path(adapter) / ADAPTER_CONFIG) or {}
        rank = max([lora.get("r") or rank, *(lora.get("rank_pattern") or {}).values()])
        if rank > LORA_RANKS[-1]:
            raise RecipeError(
                f"`adapter`: {adapter} has rank {rank}, and vLLM takes {LORA_RANKS[-1]} at most. Merge it."
            )
    settings = EngineSettings(
        model=config.model.model_name_or_path,
        config=config.generation,
        adapter=None if adapter is None else ("refine", 1, adapter),
        max_lora_rank=next(allowed for allowed in LORA_RANKS if allowed >= rank),
        revision=config.model.model_revision,
        trust_remote_code=config.trust_remote_code,
    )
    sampling = sampling_by_turn(config)
    task = Task(
        work.prompts,
        work.answers,
        Strategy(config.refinements, config.generation.answer_pattern),
        sampling,
        (config.seed, "refine"),
        Intake(None, "best_over_worst", sampling[0], report.note),
    )
    answer_tasks(settings, [task], None, work.probe, report)


def check_prompts(work: WorkDir, config: RefineConfig, report: Reporter) -> None:
    """Do the prompts go with the tokenizer?"""
    name = config.model.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=config.model.model_revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise RecipeError(f"`model.model_name_or_path`: {load_problem(name, error)}") from error
    is_text = isinstance(next(read_rows(work.prompts))["prompt"], str)
    if not is_text and tokenizer.chat_template is None:
        raise RecipeError(f"the prompts are messages, and the tokenizer of {name} has no chat template. Give texts.")
    if is_text and tokenizer.chat_template is not None and not config.drafts.stop:
        report.note(
            f"the prompts are texts, and {name} continues them as they are. Its tokenizer has a chat template: for a chat, make each prompt "
            "a list of messages."
        )


def local_adapter(config: RefineConfig) -> str | None:
    """The adapter's directory; one on the Hub is downloaded."""
    if config.adapter is None or Path(config.adapter).is_dir():
        return config.adapter
    try:
        return snapshot_download(config.adapter)
    except (OSError, ValueError) as error:
        raise RecipeError(f"`adapter`: {load_problem(config.adapter, error)}") from error


def scorers_of(work: WorkDir, config: RefineConfig) -> list[Scorer]:
    model = config.model
    encode = Tokenizer(model.model_name_or_path, model.model_revision, model.trust_remote_code)
    made = make_scorers({"scores": config.scores.each()}, config.generation, encode, Watch(work.verifier_call))
    return made["scores"]


def check(work: WorkDir, config: RefineConfig) -> None:
    """Try the scorers on the first prompt, before anything is generated."""
    rows = each_form((row["prompt_id"], row) for row in read_rows(work.prompts))
    row = next(iter(rows.values()))
    for scorer in scorers_of(work, config):
        check_scorers([scorer], [rows])
        if isinstance(scorer, RewardModel):
            of = scorer.config
            try:
                check_reward_model(of.reward_model, of.reward_model_revision, not isinstance(row["prompt"], str))
            except ValueError as error:
                raise RecipeError(f"`scores.reward_model`: {error}") from error


def score_by_reward_model(work: WorkDir, config: RefineConfig, name: str, report: Reporter) -> None:
    [scorer] = [scorer for scorer in config.scores.each() if scorer.name == name]
    model = RewardModel(with_absolute_paths(scorer), config.generation)
    for note in model.score([ScoreTask(work.prompts, work.answers)], ScoreCache(work.score_cache), report):
        report.note(note)


def score(work: WorkDir, config: RefineConfig, report: Reporter) -> None:
    files = [(ScoreTask(work.prompts, work.answers), "scores", work.scores)]
    score_files(files, {"scores": scorers_of(work, config)}, ScoreCache(work.score_cache), report)


if __name__ == "__main__":
    child_main(main, RefineMessage)
