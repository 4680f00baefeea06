"""
How a project's recipes are converted: the keys that identify them, and what becomes of each key.

Each project has a table, in `axolotl.py`, `llama_factory.py` and `rlhflow.py`. Keys that are in no table are problems.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..recipe_values import is_secret


# Keys of a project that identify its recipes; a single one may be a mistake in one of TRL's
LEAST_MARKS = 2
# Chat templates that belong to no model family, so that only the user knows whether the tokenizer has the same
GENERIC_TEMPLATES = ("chatml", "alpaca", "default", "empty", "fewshot", "vicuna", "zephyr", "metharme", "jinja")
NAME = "TRL's name"
UNUSED = (None, "it is not needed")
TOKENIZER = "change the tokenizer, save it beside the model, and name that directory in `model_name_or_path`"

# Fix -> keys of several projects that are problems unless they are off
_ADVICE = {
    "the reference is the initial model; for another, pass `ref_model` to the trainer in Python": "ref_model",
    "put `train.jsonl` and `test.jsonl` in one directory and name that in `dataset_name`, or set `test_split_size: 0.05`": "eval_dataset test_datasets eval_dir",
    "merge the adapter into its base (`peft`'s `merge_and_unload`), and name the result in `model_name_or_path`": "adapter_name_or_path lora_model_dir",
    "sharding is the launcher's: set `accelerate_config: fsdp2`, `deepspeed_zero2`, `deepspeed_zero3`, or your own file": "deepspeed fsdp fsdp_config dp_shard_size tensor_parallel_size",
    "pairs are not packed; see `padding_free`": "packing neat_packing sample_packing",
    "add a column `system` to the data": "default_system default_system_message",
    TOKENIZER: "tokens add_tokens add_special_tokens chat_template_jinja tokenizer_config",
}
ADVICE = {key: what for what, keys in _ADVICE.items() for key in keys.split()}


@dataclass
class Migration:
    """
    A recipe during its conversion.

    Args:
        recipe (`dict`):
            The new recipe.
        kept (`list[str]`):
            Keys that are unchanged.
        changes, problems (`list[str]`):
            One line each: a change and its reason; a key that was left out and how to fix it.
        project ([`Project`], *optional*):
            The recipe's project, unless it is TRL or alignment-handbook.
    """

    recipe: dict[str, Any] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    project: "Project | None" = None


@dataclass(frozen=True)
class Project:
    """The recipes of one project: how to identify them, and what becomes of their keys."""

    name: str
    # Keys that its recipes have and TRL's do not
    marks: frozenset[str]
    # The method of a recipe outside of DPO's family, and the evidence for it
    method: Callable[[dict[str, Any]], tuple[str, str] | None]
    # Conversions that no table can express
    step: Callable[[dict[str, Any], Migration], None]
    # Old key, or a pattern of keys -> TRL's key and the reason; `None` for keys that are left out without loss
    keys: dict[str, tuple[str | None, str]]
    # Old key -> old value -> new keys; other values are problems
    values: dict[str, dict[Any, dict[str, Any]]]
    # Like `ADVICE`, for this project alone
    advice: dict[str, str]
    # Old key -> the type of its values, which `step` relies on
    types: dict[str, Any]
    # TRL's key -> the project's default, if it differs from TRL's and matters for training
    defaults: dict[str, Any]

    def translate(self, old: dict[str, Any], migration: Migration) -> None:
        """Convert values. Names are converted with those of older recipes, in `convert.py`."""
        own = {*self.keys, *self.values, *self.types}
        for key, value in list(old.items()):
            off = key in own and not value and key not in self.advice and value not in list(self.values.get(key, ()))
            if off or value in (None, "", [], {}):
                del old[key]
                migration.changes.append(f"`{key}` left out: it was empty or off")
        if "ref_model" in old and old["ref_model"] == old.get("model_name_or_path"):
            del old["ref_model"]
            migration.changes.append("`ref_model` left out: the reference is the initial model")
        self.step(old, migration)
        translate_values(self.values, self.advice, old, migration)

    def finish(self, migration: Migration) -> None:
        """Write down the project's defaults that the old recipe relied on, and leave out keys of LoRA and quantization if they are off."""
        recipe, switches = migration.recipe, {"lora_": "use_peft", "use_bnb_": "load_in_4bit"}
        off = tuple(prefix for prefix, switch in switches.items() if not recipe.get(switch))
        for key in [key for key in recipe if key.startswith(off)]:
            migration.changes.append(f"{shown(key, recipe.pop(key))} left out: the recipe does not use it")
        added = {k: v for k, v in self.defaults.items() if k not in recipe and not k.startswith(off)}
        if added:
            recipe |= added
            migration.changes.append(f"{named(added)} added: defaults of {self.name} that differ from TRL's")


def translate_values(
    values: dict[str, dict[Any, dict[str, Any]]], advice: dict[str, str], old: dict[str, Any], migration: Migration
) -> None:
    """Replace keys that have only a few values by new ones. Other values are problems, with the key's advice."""
    for key in [key for key in values if key in old]:
        value = old.pop(key)
        new = {} if value is None else next((new for known, new in values[key].items() if known == value), None)
        if new is None:
            known = ", ".join(str(known) for known in values[key])
            migration.problems.append(f"{shown(key, value)}: {advice.get(key, f'known values are {known}')}.")
        elif any(old.get(name, value) != value for name, value in new.items()):
            migration.problems.append(f"{shown(key, value)}: {named(new)} contradicts another key. Remove one.")
        else:
            old |= new
            migration.changes.append(
                shown(key, value) + (f" -> {named(new)}" if new else " left out: it is the default here")
            )


def shown(key: str, value: Any) -> str:
    """A key with its value, on one line. Secrets, lists and mappings are not repeated."""
    text = " ".join(str(value).split())
    if isinstance(value, (list, dict)) or is_secret(tuple(key.split(".")), text):
        return f"`{key}`"
    return f"`{key}: {text if len(text) <= 60 else text[:57] + '...'}`"


def named(recipe: dict[str, Any]) -> str:
    """Keys of a recipe with their values, as YAML has them."""
    return ", ".join(f"`{key}: {str(v).lower() if isinstance(v, bool) else v}`" for key, v in recipe.items())


def name_datasets(entries: list[dict[str, Any]], migration: Migration, old: str) -> None:
    """Write one dataset as `dataset_name`; several, files or slices as TRL's `datasets:`."""
    names = {"path": "dataset_name", "name": "dataset_config", "split": "dataset_train_split"}
    if len(entries) == 1 and entries[0].keys() <= names.keys() and "[" not in str(entries[0].get("split")):
        new = {names[key]: value for key, value in entries[0].items()}
    else:
        new = {"datasets": entries}
    migration.recipe |= new
    migration.changes.append(
        f"{old} -> {named(new)}: formats are recognised by their columns, as `trl-ext doctor` shows"
    )
