"""
Preflight: every setting of a recipe is constructed once, before any work is done.

Constructing TRL's configs starts accelerate, and with it CUDA, so this runs in a process of its own: the loop's stays free of both.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import DPOConfig, ModelConfig, get_peft_config

from ...launch import recipe_launch
from ...model_files import load_problem
from ...recipe import Recipe, RecipeError, check_keys
from ...recipe_values import dotted
from ...rows.completions import judge_completions
from ...rows.judge import Findings, Judge
from ...trainers.packed_pairs import why_not_packed
from ...trainers.shifted_dpo_trainer import ShiftedDPOTrainer
from ...trainers.trackers import check_trackers
from ..children import Reporter
from ..config import LOOP_KEYS, AriesConfig, DatasetConfig, ScorerConfig
from ..data.faults import share_finding
from ..data.prompts import load_prompts, load_rows
from ..data.sft import sft_row, usable_sft_rows
from ..generation.drafts import encode_prompt, full_text_problem
from ..generation.embedded_engine import quantization_problem
from ..generation.refinements import Strategy
from ..run_dir import RunDir
from ..scoring.reward_model import check_reward_model
from ..training.launch_check import launch_problem
from ..training.settings import trainer_settings
from ..training.train import trainer_classes
from .weights import adapter_problem, weights_problem


# Keys of the trainers' configs that a recipe leaves to the loop
OWNED_KEYS = {
    "output_dir": "a round trains in its own directory, under the recipe's `output_dir`",
    "resume_from_checkpoint": "a run continues by itself",
    "push_to_hub": "`trl-ext aries export --push_to_hub REPO` uploads a finished policy, and `trl-ext aries pairs` its pairs",
    "model_init_kwargs": "the section `model` says how models are loaded",
    "eval_strategy": "the section `evaluation` says what is evaluated",
    "load_best_model_at_end": "the section `evaluation` says what is evaluated",
    "precompute_ref_log_probs": "the reference is chosen by `training.reference`, after TRL would have used it",
}


# Keys that nothing else checks before the training
POSITIVE_KEYS = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps")

# Rendered prompts of each file, evenly spaced: enough to estimate a share, within seconds
PROBED_PROMPTS = 2000


def check_recipe(run: RunDir, config: AriesConfig, recipe: Recipe, conversational: bool, report: Reporter) -> None:
    """
    Check the keys of the sections that are TRL's, construct their configs, and check the tokenizer, the prompts and the reward models.

    Args:
        run ([`~aries.run_dir.RunDir`]):
            The run. Its prompts are checked until a round has taken some.
        config ([`~aries.config.AriesConfig`]), recipe ([`~recipe.Recipe`]):
            What the recipe says, and where.
        conversational (`bool`):
            Whether the prompts are messages rather than text.
        report ([`~aries.children.Reporter`]):
            Told what the user should know.

    Raises:
        [`RecipeError`]: an unknown key; a setting that its config, its trainer or the engine refuses; a tokenizer without what the prompts
            need; or `scores.reward_model` names another kind of model.
    """
    check_trl_keys(config, recipe)
    check_splits(recipe)
    check_launch(config, recipe)
    for key in ("use_dora", "lora_modules_to_save"):
        if config.model.get(key):
            raise RecipeError(
                f"{recipe.where('model', key)}: `model.{key}`: vLLM cannot serve such an adapter. Remove it."
            )
    if config.sft is not None:
        check_trainer(config, recipe, "sft", 0)
    check_trainer(config, recipe, "training", 1)

    quantization = config.generation.quantization
    if quantization is not None and config.generation.base_urls is None:  # servers have their own
        problem = quantization_problem(quantization)
        if problem:
            raise RecipeError(f"{recipe.where('generation', 'quantization')}: `generation.quantization`: {problem}")

    tokenizer, vocabulary = check_model(run, config, recipe, conversational)
    check_answers(tokenizer, config, recipe, conversational)
    if not run.round(1).prompts.exists():
        check_prompts(tokenizer, vocabulary, config, "prompts", None, report)
        check_prompts(tokenizer, vocabulary, config, "evaluation", config.evaluation.samples, report)
        if config.sft is not None:
            check_sft_rows(tokenizer, vocabulary, config, report)

    for keys, scorer in scorer_keys(config):
        if scorer.reward_model is not None:
            try:
                problem = weights_problem(scorer.reward_model)
                if problem:
                    raise ValueError(problem)
                check_reward_model(scorer.reward_model, scorer.reward_model_revision, conversational)
            except ValueError as error:
                where = recipe.where(*keys, "reward_model")
                raise RecipeError(f"{where}: `{dotted((*keys, 'reward_model'))}`: {error}") from error


def scorer_keys(config: AriesConfig) -> list[tuple[tuple[str | int, ...], ScorerConfig]]:
    """Each scorer, with the path of keys that leads to it in the recipe."""
    sections = {("scores",): config.scores, ("evaluation", "scores"): config.evaluation.scores}
    return [
        ((*keys, "scorers", index) if scores.scorers is not None else keys, scorer)
        for keys, scores in sections.items()
        if scores is not None
        for index, scorer in enumerate(scores.each())
    ]


def check_launch(config: AriesConfig, recipe: Recipe) -> None:
    launch = recipe_launch(recipe)
    if launch is None:
        return
    sections = [config.training, *([config.sft] if config.sft is not None else [])]
    problem = launch_problem(launch, config.model, sections, torch.cuda.device_count())
    if problem:
        where = recipe.where("training", "accelerate_config")
        raise RecipeError(f"{where}: `training.accelerate_config`: {problem}")


def check_trl_keys(config: AriesConfig, recipe: Recipe) -> None:
    """
    Raises:
        [`RecipeError`]: a section has a key that its config does not know, or a value of the wrong type.
    """
    check_keys(recipe, [ModelConfig], ("model",))
    for section, number in (("sft", 0), ("training", 1)):
        if recipe.at(section) is not None:
            trainer_keys(config, recipe, section, number)


def check_splits(recipe: Recipe) -> None:
    """
    Raises:
        [`RecipeError`]: a section has a `split` beside a mixture, whose datasets have their own.
    """
    for section in ("prompts", "evaluation"):
        if recipe.at(section, "datasets") and recipe.at(section, "split") is not None:
            raise RecipeError(
                f"{recipe.where(section, 'split')}: `{section}.split` is that of `{section}.dataset`. Write a `split` in each entry of "
                f"`{section}.datasets`: it is `train` in those that name none."
            )


def trainer_keys(config: AriesConfig, recipe: Recipe, section: str, number: int) -> dict[str, Any]:
    """The checked values of a trainer's section, without the loop's own keys."""
    _, config_class = trainer_classes(trainer_settings(config, number, "unused"))
    return check_keys(recipe, [config_class], (section,), also=("dataset",) if section == "sft" else LOOP_KEYS)


def check_trainer(config: AriesConfig, recipe: Recipe, section: str, number: int) -> None:
    """Construct the config of a section, for the round of this number, and ask the trainer about it."""
    settings = trainer_settings(config, number, "unused")
    trainer_class, config_class = trainer_classes(settings)
    for key, value in trainer_keys(config, recipe, section, number).items():
        if key in POSITIVE_KEYS and not value > 0:
            raise RecipeError(f"{recipe.where(section, key)}: `{section}.{key}` must be positive, got {value}.")
        if key in OWNED_KEYS:
            raise RecipeError(
                f"{recipe.where(section, key)}: `{section}.{key}` belongs to the loop: {OWNED_KEYS[key]}. Remove it."
            )
    try:
        args = config_class(**settings.config)
        check_trackers(args)
        if issubclass(trainer_class, ShiftedDPOTrainer):
            trainer_class.refuse_options(args)
            # If a recipe leaves these out, the model decides
            said = settings.config
            most = said.get("max_batch_tokens")
            wanted = {
                "share_prompt": said.get("share_prompt"),
                "padding_free": said.get("padding_free", most is not None),
            }
            for option in filter(wanted.get, wanted):
                check_packing(args, config, option)
            if most is not None:
                trainer_class._check_token_batches(most, any(wanted.values()), args)
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise RecipeError(f"{recipe.where(section)}: `{section}`: {error}") from error


def check_model(
    run: RunDir, config: AriesConfig, recipe: Recipe, conversational: bool
) -> tuple[PreTrainedTokenizerBase, int]:
    """
    Check the model's files, its config and its tokenizer, and the adapters that the run has trained on it. No weight is loaded.

    Returns:
        `tuple`: the tokenizer, and how many embeddings there are.

    Raises:
        [`RecipeError`]: with the model's line in the recipe.
    """
    where = recipe.where("model", "model_name_or_path")
    name, revision = config.model["model_name_or_path"], config.model.get("model_revision", "main")
    trust_remote_code = config.trust_remote_code

    def refuse(problem: str) -> None:
        raise RecipeError(f"{where}: `model.model_name_or_path`: {problem}")

    problem = weights_problem(name)
    if problem:
        refuse(problem)
    try:
        of_model = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # each library raises its own for a broken file
        asked = "trust_remote_code" in str(error)
        refuse(custom_code(name) if asked else load_problem(name, error))
    text_config = of_model.get_text_config()
    if tokenizer.eos_token is None:
        refuse(f"the tokenizer of {name} has no EOS token to end answers.")
    if conversational and tokenizer.chat_template is None:
        refuse(
            f"the prompts are messages, and the tokenizer of {name} has no chat template. Give it one "
            "(`trl.clone_chat_template`), or make the prompts plain text."
        )
    check_context(recipe, text_config, config.generation.max_model_len)
    if config.model.get("use_peft"):
        with torch.device("meta"):  # shapes without weights
            base = AutoModelForCausalLM.from_config(of_model, trust_remote_code=trust_remote_code)
        adapters = [run.round(number).adapter for number in range(config.rounds + 1)]
        check_adapters(config, recipe, base, [path for path in adapters if path.is_dir()])
    return tokenizer, text_config.vocab_size


def check_adapters(config: AriesConfig, recipe: Recipe, base: PreTrainedModel, adapters: list[Path]) -> None:
    """
    Raises:
        [`RecipeError`]: the model does not take the recipe's adapter, or one that the run has made.
    """
    model_args = ModelConfig(**config.model)
    shapes = {key: tuple(m.weight.shape) for key, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    for path in adapters:
        problem = adapter_problem(path, shapes, model_args.lora_r)
        if problem:
            where = recipe.where("model", "model_name_or_path")
            raise RecipeError(
                f"{where}: `model.model_name_or_path`: {problem} Restore the adapter that the run made, or set another `output_dir`."
            )
    try:
        get_peft_model(base, get_peft_config(model_args))
    except ValueError as error:
        targets = model_args.lora_target_modules
        hint = ""
        if isinstance(targets, str) and targets != "all-linear":
            hint = (
                f" TRL takes a list of one as a pattern for the whole name: write `lora_target_modules: .*{targets}`."
            )
        raise RecipeError(f"{recipe.where('model')}: `model`: {error}{hint}") from error


def custom_code(name: str) -> str:
    return (
        f"{name} brings Python code of its own, which is not run unless you ask for it. Read it, and then set "
        "`trust_remote_code: true` in `training` and `sft`."
    )


def check_context(recipe: Recipe, config: PretrainedConfig, max_model_len: int) -> None:
    """Refuse sequences longer than the model's positions, unless scaling stretches these. vLLM would refuse them only after the SFT."""
    positions = getattr(config, "max_position_embeddings", None)  # some architectures have none
    rope = getattr(config, "rope_parameters", None) or {}  # nor these
    if positions is None or max_model_len <= positions or rope.get("rope_type", "default") != "default":
        return
    where = recipe.where("generation", "max_model_len")
    raise RecipeError(
        f"{where}: `generation.max_model_len` is {max_model_len:,}, but the model has {positions:,} positions. Lower it, and "
        "`drafts.max_tokens` with it."
    )


def check_answers(
    tokenizer: PreTrainedTokenizerBase, config: AriesConfig, recipe: Recipe, conversational: bool
) -> None:
    """
    Raises:
        [`RecipeError`]: an answer cannot end at a token that is to end it, or a thought cannot be learned.
    """
    for section, token_ids in {
        "drafts": config.drafts.stop_token_ids,
        "refinements": config.refinements.stop_token_ids,
    }.items():
        unknown = [i for i in token_ids or () if i >= len(tokenizer)]
        if unknown:
            raise RecipeError(
                f"{recipe.where(section, 'stop_token_ids')}: `{section}.stop_token_ids` has {unknown[0]}, and the tokenizer has the tokens 0 to "
                f"{len(tokenizer) - 1:,}."
            )
    problem = full_text_problem(tokenizer) if config.pairs.learn == "full_text" and conversational else None
    if problem:
        where = recipe.where("pairs", "learn")
        raise RecipeError(
            f"{where}: `pairs.learn: full_text`: {problem}. Learn the answer, or make the prompts plain text."
        )


def check_prompts(
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    config: AriesConfig,
    section: str,
    samples: int | None,
    report: Reporter,
) -> None:
    """
    Judge the prompts of a section, the first `samples` or all, and render some of them as the engine will.

    Raises:
        [`RecipeError`]: the chat template refuses one, one has a token without embedding, or too many leave no room for a draft.
    """
    key, entries = f"{section}.dataset", getattr(config, section).entries()
    longest = config.generation.max_model_len - config.drafts.max_tokens
    rows = load_prompts(entries, key, samples)
    count = len(rows)
    judge = Judge(tokenizer, Findings(f"prompts of `{key}`"), vocabulary)
    for number, row in enumerate(rows, start=1):
        judge.row(number, row["prompt"], [], row)
    judge.findings.check(most=0)
    # All of them if a token without embedding may be among them
    step = 1 if len(tokenizer) > vocabulary else -(-count // PROBED_PROMPTS)
    probed = range(0, count, step)
    too_long = 0
    for number in probed:
        row = rows[number]
        try:
            ids = encode_prompt(tokenizer, row["prompt"])
        except RecipeError as error:
            raise RecipeError(f"`{key}`: {row['prompt_id']}: {error}") from error
        too_long += len(ids) > longest
        judge.row_ids(number + 1, np.array(ids), [], None)
    judge.findings.check(most=0)
    for warning in warnings(judge.findings, config):
        report.note(warning)
    finding = share_finding(f"prompts of `{key}`", {"prompt_too_long": too_long}, len(probed), config.health)
    if finding:
        raise RecipeError(
            f"{finding}: they have more than {longest:,} tokens, which is `generation.max_model_len` less "
            "`drafts.max_tokens`. Raise the first, lower the second, or remove long prompts."
        )


def check_sft_rows(tokenizer: PreTrainedTokenizerBase, vocabulary: int, config: AriesConfig, report: Reporter) -> None:
    """
    Judge the rows for SFT as they will be rendered.

    Raises:
        [`RecipeError`]: too many cannot be trained on.
    """
    dataset = config.sft["dataset"]
    rows, dropped = usable_sft_rows(load_rows(DatasetConfig(dataset), "sft.dataset"), dataset)
    if empty := dropped.get("empty_completion"):
        total = len(rows) + empty
        report.note(
            f"Left out: {empty:,} of {total:,} rows of `sft.dataset` have no text in `completion`. Write it, or remove them."
        )
    template = Strategy(config.refinements).templates[0]
    rows = (sft_row(row, template) for row in rows)
    max_length = trainer_settings(config, 0, "unused").config["max_length"]
    _, findings = judge_completions(rows, tokenizer, "rows of `sft.dataset`", vocabulary, max_length)
    findings.check(config.health.max_dropped)
    for line in [*findings.drops, *warnings(findings, config)]:
        report.note(line)


def warnings(findings: Findings, config: AriesConfig) -> list[str]:
    """What is odd about some rows. That they are plain text is not, in a recipe that says where an answer to plain text ends."""
    if config.drafts.stop:
        del findings.warned["plain text"]
    return findings.warnings


def check_packing(args: DPOConfig, config: AriesConfig, option: str) -> None:
    """Raise a `ValueError` if the recipe's model does not allow `padding_free` or `share_prompt`."""
    model_args = ModelConfig(**config.model)
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
    }
    reason = why_not_packed(model_args.model_name_or_path, args, share_prompt=option == "share_prompt")
    if reason is not None:
        raise ValueError(f"`{option}: true` is not supported here: {reason} Or leave it out.")
