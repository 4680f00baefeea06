"""
Preflight: every setting of a recipe is constructed once, in a process of its own, before any work is done.

Constructing TRL's configs starts accelerate, and with it CUDA; the process that runs the loop stays free of both.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from trl import ModelConfig

from ..recipe import Recipe, RecipeError, check_keys
from ..trainers.packed_pairs import why_not_packed
from ..trainers.pairwise_trainer import PairwiseTrainer
from ..trainers.self_refine_dpo_config import SelfRefineDPOConfig
from ..trainers.tdpo_config import TDPOConfig
from .children import child_main
from .config import LOOP_KEYS
from .reward_model import check_reward_model
from .training import trainer_classes


# Keys of the trainers' configs that a recipe leaves to the loop
OWNED_KEYS = {
    "output_dir": "a round trains in its own directory, under the recipe's `output_dir`",
    "resume_from_checkpoint": "a run continues by itself",
    "model_init_kwargs": "the section `model` says how models are loaded",
    "eval_strategy": "the section `evaluation` says what is evaluated",
    "load_best_model_at_end": "the section `evaluation` says what is evaluated",
    "precompute_ref_log_probs": "the reference is chosen by `training.reference`, after TRL would have used it",
}


def main(job: dict[str, Any], progress: Callable[[int, int], None]) -> None:
    """
    The child process: check the keys of the sections that are TRL's, construct their configs, and look at the tokenizer
    and the reward model.

    Raises:
        [`RecipeError`]: an unknown key, a setting that its config, its trainer or the engine refuses, a tokenizer without
        what the prompts need, or a reward model that is none.
    """
    recipe = Recipe(
        Path(job["recipe"]["path"]),
        job["recipe"]["mapping"],
        {tuple(keys): where for keys, where in job["recipe"]["locations"]},
    )
    check_keys(recipe, [ModelConfig], ("model",))
    for key in ("use_dora", "lora_modules_to_save"):
        if recipe.mapping["model"].get(key):
            raise RecipeError(
                f"{recipe.where('model', key)}: `model.{key}`: vLLM cannot serve such an adapter. Remove it."
            )
    for section, own_keys in {"sft": ("dataset",), "training": LOOP_KEYS}.items():
        settings = job[section]
        if settings is None:
            continue
        trainer_class, config_class = trainer_classes(settings)
        for key in check_keys(recipe, [config_class], (section,), also=own_keys):
            if key in OWNED_KEYS:
                raise RecipeError(
                    f"{recipe.where(section, key)}: `{section}.{key}` belongs to the loop: {OWNED_KEYS[key]}. Remove it."
                )
        try:
            args = config_class(**settings["config"])
            if issubclass(trainer_class, PairwiseTrainer):
                trainer_class._refuse_options(args)
            if settings["config"].get("share_prompt"):  # where a recipe leaves it out, the model decides
                check_share_prompt(args, recipe)
        except (ValueError, TypeError, ImportError, OSError) as error:
            raise RecipeError(f"{recipe.where(section)}: `{section}`: {error}") from error

    name, where = recipe.at("model", "model_name_or_path"), recipe.where("model", "model_name_or_path")
    trust_remote_code = bool(job["training"]["config"].get("trust_remote_code", False))
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name,
            revision=recipe.mapping["model"].get("model_revision", "main"),
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise RecipeError(f"{where}: `model.model_name_or_path`: {error}") from error
    if tokenizer.eos_token is None:
        raise RecipeError(
            f"{where}: `model.model_name_or_path`: the tokenizer of {name} has no EOS token to end answers."
        )
    if job["conversational"] and tokenizer.chat_template is None:
        raise RecipeError(
            f"{where}: the prompts are messages, and the tokenizer of {name} has no chat template. Give it one "
            "(`trl.clone_chat_template`), or make the prompts plain text."
        )

    listed = recipe.at("scores", "scorers") or []
    for keys in [("scores",), *(("scores", "scorers", i) for i in range(len(listed)))]:
        name = recipe.at(*keys, "reward_model")
        if name is not None:
            try:
                check_reward_model(name, recipe.at(*keys, "reward_model_revision"), job["conversational"])
            except ValueError as error:
                where = recipe.where(*keys, "reward_model")
                raise RecipeError(f"{where}: `scores.reward_model`: {error}") from error


def check_share_prompt(args: TDPOConfig | SelfRefineDPOConfig, recipe: Recipe) -> None:
    """Raise a `ValueError` if the recipe's model cannot do with `share_prompt`."""
    model_args = ModelConfig(**recipe.mapping["model"])
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
    }
    reason = why_not_packed(model_args.model_name_or_path, args)
    if reason is not None:
        raise ValueError(f"`share_prompt: true` is not supported here: {reason} Or leave it out.")


if __name__ == "__main__":
    child_main(main)
