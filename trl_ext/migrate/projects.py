"""
How the recipes of a project are read: the keys by which they are recognised, and what becomes of each key.

One table a project, in `axolotl.py`, `llama_factory.py` and `rlhflow.py`. Keys that are in none of them are problems with the same sentence.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..recipe_values import is_secret


# A recipe must have this many keys of a project: one alone may be a slip in a recipe of TRL's
LEAST_MARKS = 2
# Chat templates that belong to no model family: whether the tokenizer has the same one is the user's to say
GENERIC_TEMPLATES = ("chatml", "alpaca", "default", "empty", "fewshot", "vicuna", "zephyr", "metharme", "jinja")
NAME = "TRL's name"
UNUSED = (None, "nothing here needs it")
TOKENIZER = "change the tokenizer, save it beside the model, and name that directory in `model_name_or_path`"

# What to do about keys of several projects that are a problem unless they are off -> the keys
_ADVICE = {
    "the reference is the model as it starts; give `ref_model` to the trainer in Python for another": "ref_model",
    "put `train.jsonl` and `test.jsonl` in one directory and name that in `dataset_name`, or set `test_split_size: 0.05`": "eval_dataset test_datasets eval_dir",
    "merge the adapter into its base (`peft`'s `merge_and_unload`), and name that in `model_name_or_path`": "adapter_name_or_path lora_model_dir",
    "the launcher shards: `accelerate_config: fsdp2`, `deepspeed_zero2`, `deepspeed_zero3`, or your own file": "deepspeed fsdp fsdp_config dp_shard_size tensor_parallel_size",
    "pairs are not packed; see `padding_free`": "packing neat_packing sample_packing",
    "give the rows a column `system`": "default_system default_system_message",
    TOKENIZER: "tokens add_tokens add_special_tokens chat_template_jinja tokenizer_config",
}
ADVICE = {key: what for what, keys in _ADVICE.items() for key in keys.split()}


@dataclass
class Migration:
    """
    A recipe on its way.

    Args:
        recipe (`dict`):
            The new recipe.
        kept (`list[str]`):
            Keys that stayed as they were.
        changes, problems (`list[str]`):
            One line each: what and why; what was left out and what to do.
        project ([`Project`], *optional*):
            Whose recipe it is, if it is not TRL's or alignment-handbook's.
    """

    recipe: dict[str, Any] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    project: "Project | None" = None


@dataclass(frozen=True)
class Project:
    """The recipes of one project: how to recognise them, and what becomes of their keys."""

    name: str
    # Keys that its recipes have and TRL's have not
    marks: frozenset[str]
    # The method of a recipe that is not of DPO's family, and what shows it
    method: Callable[[dict[str, Any]], tuple[str, str] | None]
    # What no table can say
    step: Callable[[dict[str, Any], Migration], None]
    # Old key, or a pattern of keys -> TRL's key and why; `None` for what is left out without loss
    keys: dict[str, tuple[str | None, str]]
    # Old key -> old value -> what says it here; other values are problems
    values: dict[str, dict[Any, dict[str, Any]]]
    # As `ADVICE`, of this project alone
    advice: dict[str, str]
    # Old key -> the type of its values, for `step` to rely on
    types: dict[str, Any]
    # TRL's key -> the project's default, if TRL's is another and training would differ
    defaults: dict[str, Any]

    def translate(self, old: dict[str, Any], migration: Migration) -> None:
        """Give values their form here. What becomes of names is decided with those of older recipes, in `convert.py`."""
        own = {*self.keys, *self.values, *self.types}
        for key, value in list(old.items()):
            off = key in own and not value and key not in self.advice and value not in list(self.values.get(key, ()))
            if off or value in (None, "", [], {}):
                del old[key]
                migration.changes.append(f"`{key}` left out: it was empty or off")
        if "ref_model" in old and old["ref_model"] == old.get("model_name_or_path"):
            del old["ref_model"]
            migration.changes.append("`ref_model` left out: the reference is the model as it starts")
        self.step(old, migration)
        translate_values(self.values, self.advice, old, migration)

    def finish(self, migration: Migration) -> None:
        """Write down the project's defaults on which the old recipe relied, and leave out what belongs to LoRA without it."""
        recipe, switches = migration.recipe, {"lora_": "use_peft", "use_bnb_": "load_in_4bit"}
        off = tuple(prefix for prefix, switch in switches.items() if not recipe.get(switch))
        for key in [key for key in recipe if key.startswith(off)]:
            migration.changes.append(f"{shown(key, recipe.pop(key))} left out: nothing in the recipe uses it")
        added = {k: v for k, v in self.defaults.items() if k not in recipe and not k.startswith(off)}
        if added:
            recipe |= added
            migration.changes.append(f"{named(added)} added: defaults of {self.name}, other than TRL's")


def translate_values(
    values: dict[str, dict[Any, dict[str, Any]]], advice: dict[str, str], old: dict[str, Any], migration: Migration
) -> None:
    """Put what says a value today in the place of keys that have only a few values; others are problems, with the key's advice."""
    for key in [key for key in values if key in old]:
        value = old.pop(key)
        new = {} if value is None else next((new for known, new in values[key].items() if known == value), None)
        if new is None:
            known = ", ".join(str(known) for known in values[key])
            migration.problems.append(f"{shown(key, value)}: {advice.get(key, f'known are {known}')}.")
        elif any(old.get(name, value) != value for name, value in new.items()):
            migration.problems.append(f"{shown(key, value)}: {named(new)} contradicts another key. Remove one.")
        else:
            old |= new
            migration.changes.append(shown(key, value) + (f" -> {named(new)}" if new else " left out: as here"))


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
    """One dataset by `dataset_name`; several, files or slices as TRL's `datasets:`."""
    names = {"path": "dataset_name", "name": "dataset_config", "split": "dataset_train_split"}
    if len(entries) == 1 and entries[0].keys() <= names.keys() and "[" not in str(entries[0].get("split")):
        new = {names[key]: value for key, value in entries[0].items()}
    else:
        new = {"datasets": entries}
    migration.recipe |= new
    migration.changes.append(f"{old} -> {named(new)}: rows are recognised by their columns, as `trl-ext doctor` shows")
