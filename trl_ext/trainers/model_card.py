"""
Model cards: TRL's template with the data and the recipe added, and without links to what is not on the Hub.
"""

import os
from dataclasses import MISSING, fields
from pathlib import Path

import yaml
from accelerate.logging import get_logger
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, TrainingArguments
from trl import DPOTrainer
from trl.trainer.utils import generate_model_card, get_config_model_id


logger = get_logger(__name__)

# Settings of a run's environment, which say nothing about the training
LEFT_OUT = frozenset(
    "output_dir run_name report_to logging_dir project trackio_space_id disable_tqdm log_level hub_token hub_model_id hub_strategy "
    "hub_private_repo push_to_hub resume_from_checkpoint local_rank deepspeed fsdp fsdp_config accelerator_config parallelism_config "
    "model_init_kwargs".split()
)
NEXT_SECTION = "### Framework versions"
# What TRL's template says of every model: a key that is misspelt and names no licence, and a question
NO_LICENCE = "licence: license\n"
QUESTION = "If you had a time machine, but could only go to the past or the future once and never return, which would you choose and why?"
CHAT_CALL = 'generator([{"role": "user", "content": question}], '


def settings(args: TrainingArguments) -> dict:
    """The settings that differ from their fields' defaults. (A second `args` with the defaults would reset accelerate's state.)"""
    defaults = {
        field.name: field.default_factory() if field.default_factory is not MISSING else field.default
        for field in fields(args)
    }
    given = {key: value for key, value in args.to_dict().items() if key not in LEFT_OUT and value != defaults.get(key)}
    if "pad_token" in given:  # transformers hides it as a secret
        given["pad_token"] = args.pad_token
    return {key: value for key, value in given.items() if isinstance(value, (str, int, float, bool, list))}


def model_settings(model: PreTrainedModel | PeftModel, base: str | None) -> dict:
    """The model and its adapter, in the keys of TRL's `ModelConfig`."""
    found = {} if base is None else {"model_name_or_path": base}
    if getattr(model, "is_loaded_in_4bit", False):
        found["load_in_4bit"] = True
    lora = model.peft_config.get("default") if isinstance(model, PeftModel) else None
    if isinstance(lora, LoraConfig):
        found |= {"use_peft": True, "lora_r": lora.r, "lora_alpha": lora.lora_alpha, "lora_dropout": lora.lora_dropout}
        for name, targets in (
            ("lora_target_modules", lora.target_modules),
            ("lora_target_parameters", lora.target_parameters),
        ):
            if targets:  # weights of experts are parameters without modules
                found[name] = targets if isinstance(targets, str) else sorted(targets)
    return found


def trl_card(
    base: str | None, name: str, repo: str, dataset: str | None, tags: list[str], method: str, paper: dict[str, str]
) -> ModelCard:
    """TRL's card for a model without a trainer; `paper` is like a trainer's `_paper`."""
    return generate_model_card(
        base_model=base,
        model_name=name,
        hub_model_id=repo,
        dataset_name=dataset,
        tags=tags,
        wandb_url=None,
        trackio_url=None,
        trainer_name=method,
        trainer_citation=paper["citation"],
        paper_title=paper["title"],
        paper_id=paper["id"],
    )


def completed(card: str, base: str | None, chat: bool, sections: dict[str, str]) -> str:
    """
    Adapt a card to local models and add sections to it.

    Args:
        card (`str`):
            A card from TRL's template.
        base (`str`, *optional*):
            The base model, a name on the Hub or a path.
        chat (`bool`):
            Whether the model takes messages, as in the template's example.
        sections (`dict[str, str]`):
            Heading -> text of the sections to add before the versions.

    Returns:
        `str`: the card.
    """
    name = "a model on disk" if base is None else f"`{os.path.basename(os.path.normpath(base))}`"
    card = card.replace("[None](https://huggingface.co/None)", name).replace(NO_LICENCE, "")
    card = card.replace(QUESTION, "Why is the sky blue?")
    if not chat:
        card = card.replace(CHAT_CALL, "generator(question, ")
    added = "".join(f"### {heading}\n\n{text}\n\n" for heading, text in sections.items())
    return card.replace(NEXT_SECTION, added + NEXT_SECTION)


def recipe_section(recipe: dict) -> str:
    return f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}```"


def complete_card(trainer: DPOTrainer, source: str | None) -> None:
    """Add the data and the recipe to the card that TRL has written for a trainer; `source` is the name of the data."""
    args, rows, base = trainer.args, trainer.train_dataset, get_config_model_id(trainer.model.config)
    count = f"{len(rows):,} preference pairs" if isinstance(rows, Dataset) else "A stream"
    file = Path(args.output_dir) / "README.md"
    try:  # a checkpoint writes its card first, and an error in a card must not end the training
        recipe = recipe_section(
            {**model_settings(trainer.accelerator.unwrap_model(trainer.model), base), **settings(args)}
        )
    except Exception as error:
        logger.warning(f"The model card {file} has no recipe: {type(error).__name__}: {error}")
        return
    sections = {"Data": f"{count}." if source is None else f"{count} of `{source}`.", "Recipe": recipe}
    chat = getattr(trainer.processing_class, "chat_template", None) is not None
    card = file.read_text(encoding="utf-8").replace('model="None"', f'model="{file.parent.name}"')  # not on the Hub
    file.write_text(completed(card, base, chat, sections), encoding="utf-8")
