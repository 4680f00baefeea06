"""
What a project's recipes have of their own: the keys by which they are recognised, and what becomes of each key.

The tables are in one module a project (`axolotl.py`, `llama_factory.py`, `rlhflow.py`); values that no table can translate, in its steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .convert import Migration


# Marks that a recipe must have of a project: one key alone may be a slip in a recipe of TRL's
LEAST_MARKS = 2

# Answers that several projects share
SPEED = "it changes the speed alone, and what is used here is chosen by itself"
NO_ADAPTER = (
    "merge the adapter into its base (`peft`'s `merge_and_unload`), save that, and name it in `model_name_or_path`"
)
SHARDING = "sharding is the launcher's: `accelerate_config: fsdp2`, `deepspeed_zero2`, `deepspeed_zero3`, or a file of your own"

# Templates that are no model family's own: whether the tokenizer has the same one is the user's to say
_GENERIC_TEMPLATES = (
    "chatml",
    "chatml_de",
    "alpaca",
    "default",
    "empty",
    "fewshot",
    "vicuna",
    "zephyr",
    "metharme",
    "jinja",
)


@dataclass(frozen=True)
class Project:
    """
    The recipes of one project.

    Args:
        name (`str`):
            The project's.
        marks (`frozenset[str]`):
            Keys that its recipes have and TRL's have not.
        method (`Callable[[dict], tuple[str, str] | None]`):
            The method of a recipe that is not of DPO's family, and what shows it.
        steps (`tuple[Callable[[dict, Migration], None], ...]`):
            What no table can say. Each takes its keys out of the old recipe, or gives them TRL's names.
        renamed, gone, neutral (`dict`):
            As in `keys.py`. A name `prefix_*` in `gone` stands for all keys with that prefix.
        switches (`tuple[str, ...]`):
            Keys that say nothing when they are off.
        types (`dict`):
            Key -> the type of its values, for the steps to rely on.
        defaults (`dict`):
            Key of TRL -> the project's default, where TRL's is another.
    """

    name: str
    marks: frozenset[str]
    method: Callable[[dict[str, Any]], tuple[str, str] | None]
    steps: tuple[Callable[[dict[str, Any], "Migration"], None], ...]
    renamed: dict[str, tuple[str, str]] = field(default_factory=dict)
    gone: dict[str, str] = field(default_factory=dict)
    neutral: dict[str, tuple[Any, str]] = field(default_factory=dict)
    switches: tuple[str, ...] = ()
    types: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)

    def translate(self, old: dict[str, Any], migration: "Migration") -> None:
        """Give what is in `old` TRL's names, or take it out; what stays is judged as any older recipe's key."""
        for key in [key for key, value in old.items() if value is None or (value is False and key in self.switches)]:
            what = "empty" if old.pop(key) is None else "it was off"
            migration.changes.append(f"`{key}` left out: {what}")
        for step in self.steps:
            step(old, migration)
        for key, (new, why) in self.renamed.items():
            if key not in old:
                continue
            value = old.pop(key)
            if new in old or new in migration.recipe:
                migration.problems.append(f"`{key}: {value}`: `{new}` is given too, and kept. Remove one.")
            else:
                old[new] = value
                migration.changes.append(f"`{key}` -> `{new}`: {why}")

    def add_defaults(self, migration: "Migration") -> None:
        """Write down the project's defaults on which the old recipe relied."""
        added = {key: value for key, value in self.defaults.items() if key not in migration.recipe}
        if not migration.recipe.get("use_peft"):
            added = {key: value for key, value in added.items() if not key.startswith("lora_")}
        if added:
            migration.recipe |= added
            shown = ", ".join(f"`{key}: {value}`" for key, value in added.items())
            migration.changes.append(f"{shown} added: defaults of {self.name}, other than TRL's")


def account_of_template(old: dict[str, Any], migration: "Migration", key: str, own: tuple[str, ...]) -> None:
    """A chat template by its name in the project: here it is the tokenizer's own."""
    name = old.pop(key, None)
    if name is None:
        return
    if name in own:
        migration.changes.append(f"`{key}: {name}` left out: the tokenizer's own template is always used")
    elif name in _GENERIC_TEMPLATES or not isinstance(name, str):
        migration.problems.append(
            f"`{key}: {name}`: the template here is the tokenizer's own. If that is another one, or none, set `tokenizer.chat_template`, "
            "save tokenizer and model in one directory, and name it in `model_name_or_path`."
        )
    else:
        migration.changes.append(
            f"`{key}: {name}` left out: the tokenizer's own template is used; `trl-ext doctor` shows two rows rendered with it"
        )


def column_problems(where: str, path: str, renamed: dict[str, str]) -> list[str]:
    """Columns that must be renamed in the data, since a recipe has no key for that."""
    if not renamed:
        return []
    return [
        f"{where}: the columns must be renamed in the data: `datasets.load_dataset({path!r}, split='train').rename_columns({renamed})"
        ".to_json('pairs.jsonl')`. Then name pairs.jsonl in the place of the dataset."
    ]
