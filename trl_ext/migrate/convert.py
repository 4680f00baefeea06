"""
Converts one mapping to another, with an account of every key.

Values are checked with the dataclasses that parse a current recipe, so that the result parses; options that the method's trainer refuses
are problems.
"""

import copy
import re
from dataclasses import make_dataclass
from fnmatch import fnmatchcase
from typing import Any

from ..recipe import Recipe, RecipeError, check_keys
from ..recipe_values import LAUNCH_KEYS, is_secret, unknown_key
from .axolotl import AXOLOTL
from .data import from_mixer, from_mixture
from .keys import LOSS_TYPES, MARKS, METHODS, NEUTRAL, RENAMED, TYPES, USE, VALUES, WANDB
from .llama_factory import LLAMA_FACTORY
from .projects import ADVICE, GENERIC_TEMPLATES, LEAST_MARKS, Migration, Project, shown, translate_values
from .rlhflow import RLHFLOW


def recognise(recipe: Recipe) -> Project | None:
    """The project whose keys a recipe has; `None` for TRL, or a project with TRL's keys such as alignment-handbook."""
    found = max((AXOLOTL, LLAMA_FACTORY, RLHFLOW), key=lambda project: len(project.marks & recipe.mapping.keys()))
    return found if len(found.marks & recipe.mapping.keys()) >= LEAST_MARKS else None


def other_method(recipe: Recipe, text: str) -> tuple[str, str] | None:
    """The method of a recipe outside of DPO's family, and the evidence for it."""
    for key, method in MARKS.items():
        if key in recipe.mapping:
            return method, f"{recipe.where(key)}: `{key}` is a key of {method}"
    words = {name.upper(): name for name in METHODS}
    for directory in () if recipe.path is None else (recipe.path.parent.name, recipe.path.stem):
        for word in re.split(r"[^A-Za-z]+", directory):
            if word.upper() in words:
                return words[word.upper()], f"{recipe.path}: `{directory}` in its path"
    found = re.search(rf"^\s*#.*?\b({'|'.join(METHODS)})(?:Trainer|Config)\b", text, flags=re.MULTILINE)
    return (found[1], f"{recipe.path}: the comment `{found[0].strip()}`") if found else None


def classes(method: str) -> tuple[type, tuple[type, ...]]:
    """The trainer of a method, and the dataclasses that parse its recipe."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

    from .. import SelfRefineDPOTrainer, TDPOTrainer

    trainer = {"tdpo": TDPOTrainer, "self-refine-dpo": SelfRefineDPOTrainer}[method]
    return trainer, (ScriptArguments, trainer.config_class, ModelConfig, DatasetMixtureConfig)


def convert(recipe: Recipe, text: str, method: str) -> Migration:
    """
    Convert a recipe.

    Args:
        recipe ([`~recipe.Recipe`]), text (`str`):
            The old recipe, and its file's text, whose comments may name the method.
        method (`str`):
            `"tdpo"` or `"self-refine-dpo"`.

    Raises:
        [`RecipeError`]: the recipe is for another method.
    """
    project = recognise(recipe)
    found = other_method(recipe, text) if project is None else project.method(recipe.mapping)
    if found is not None:
        name, reason = found
        whose, more = f"{reason}: this is a recipe of {name}", ""
        if project is None:
            more = "; if it is a DPO recipe after all, remove the key or rename the file"
        else:
            whose = f"{recipe.where()}: this is a recipe of {project.name} for {name} ({reason})"
        raise RecipeError(
            f"{whose}, but trl-ext trains on preference pairs with a reference (DPO's family). Use "
            f"{USE.get(name, 'its own trainer; TRL has none for it')}{more}."
        )
    if isinstance(recipe.mapping.get("prompts"), dict):
        raise RecipeError(f"{recipe.where('prompts')}: this is a current ARIES recipe; there is nothing to migrate.")
    trainer, config_classes = classes(method)
    migration = Migration(project=project)
    old = {str(key): copy.deepcopy(value) for key, value in recipe.mapping.items()}
    if project is not None:
        _check_types(old, migration, project.types)
        project.translate(old, migration)
    translate_values(VALUES, {}, old, migration)
    for step in (_precision, _names, _check_types, _data, _lengths, _loss, _model):
        step(old, migration)
    for key, value in list(old.items()):
        _key(key, value, old, migration)
    if project is not None:
        project.finish(migration)
    _keep_defaults(recipe.mapping, migration)
    _check(migration, config_classes, trainer)
    migration.kept = [key for key in migration.kept if key in recipe.mapping and key in migration.recipe]
    script, _, model, mixture = config_classes  # the model first, then the data, then the rest in the old order
    first = [name for cls in (model, script, mixture) for name in cls.__dataclass_fields__ if name in migration.recipe]
    migration.recipe = {key: migration.recipe[key] for key in dict.fromkeys([*first, *migration.recipe])}
    return migration


# Steps, each of which removes its keys from `old`


def _check_types(old: dict[str, Any], migration: Migration, types: dict[str, Any] = TYPES) -> None:
    """Move values of a wrong type to the problems."""
    for key in [key for key in types if old.get(key) is not None]:
        problem = _problem((make_dataclass("Keys", [(key, types[key])]),), key, old[key])
        if problem:
            del old[key]
            migration.problems.append(problem)


def _names(old: dict[str, Any], migration: Migration) -> None:
    """Rename keys, and leave out those that are gone."""
    known = RENAMED | (migration.project.keys if migration.project else {})
    given = dict(old)
    old.clear()
    for key, value in given.items():
        new, why = next((known[name] for name in known if fnmatchcase(key, name)), (key, ""))
        if new is None:
            migration.changes.append(f"{shown(key, value)} left out: {why}")
        elif new != key and (new in given or new in old or new in migration.recipe):
            migration.problems.append(f"`{key}` is an old name of `{new}`, and both are given. `{new}` is kept.")
        else:
            old[new] = value
            migration.changes += [f"`{key}` -> `{new}`: {why}"] if why else []


def _data(old: dict[str, Any], migration: Migration) -> None:
    for key, read in (("dataset_mixer", from_mixer), ("dataset_mixture", from_mixture)):
        if old.get(key) is None:
            continue
        changes, problems = read(old, migration.recipe)
        migration.changes += changes
        migration.problems += problems
    if old.get("dataset_splits") is not None:  # without a mixer, these are the splits of `dataset_name`
        splits = old.pop("dataset_splits")
        for key, word in (("dataset_train_split", "train"), ("dataset_test_split", "test")):
            named = [split for split in ([splits] if isinstance(splits, str) else splits) if word in split]
            if len(named) == 1:
                migration.recipe[key] = named[0]
                migration.changes.append(f"`dataset_splits` -> `{key}: {named[0]}`: TRL's name")


def _precision(old: dict[str, Any], migration: Migration) -> None:
    if "torch_dtype" in old and old["torch_dtype"] is None:
        del old["torch_dtype"]
        migration.recipe["dtype"] = "float32"
        migration.changes.append("`torch_dtype: null` -> `dtype: float32`: its meaning in transformers 4")


def _lengths(old: dict[str, Any], migration: Migration) -> None:
    keys = [key for key in ("max_prompt_length", "max_completion_length") if key in old]
    given = {key: old.pop(key) for key in keys}
    if not keys:
        return
    whole = len(keys) == 2 and all(isinstance(value, int) for value in given.values())
    if old.get("max_length") is None and whole:
        old["max_length"] = sum(given.values())
        migration.changes.append(
            f"`max_prompt_length` + `max_completion_length` -> `max_length: {old['max_length']}`: one limit for both"
        )
        return
    for key, value in given.items():
        migration.changes.append(
            f"`{key}: {value}` left out: TRL removed it. `max_length` ({old.get('max_length') or 'by default 1024'}) limits "
            "prompt and answer together and cuts off the end of the answer; rows whose prompt alone fills it are left out and "
            "counted"
        )


def _loss(old: dict[str, Any], migration: Migration) -> None:
    names = old.pop("loss_type", None)
    names = [names] if isinstance(names, str) else names
    if names is not None:
        renamed = [LOSS_TYPES.get(name, name) for name in names]
        if renamed != names:
            migration.changes.append(f"`loss_type: {names}` -> `{renamed}`: TRL renamed it")
        migration.recipe["loss_type"] = renamed
        if renamed == names:
            migration.kept.append("loss_type")
    alpha = old.pop("rpo_alpha", None)
    if alpha is not None:
        losses = migration.recipe.get("loss_type", ["sigmoid"])
        migration.recipe |= {"loss_type": [*losses, "sft"], "loss_weights": [*([1.0] * len(losses)), float(alpha)]}
        migration.changes.append(
            f"`rpo_alpha: {alpha}` -> `loss_type: {migration.recipe['loss_type']}`, `loss_weights: "
            f"{migration.recipe['loss_weights']}`: TRL's form of the NLL term"
        )
    if old.get("truncation_mode") == "keep_end":
        migration.changes.append("`truncation_mode: keep_end` kept, but TRL 2 removes it; the default is `keep_start`")
    if "label_smoothing" in old and not old["label_smoothing"]:
        old.pop("label_smoothing")
        migration.changes.append("`label_smoothing: 0` left out: the default")


def _model(old: dict[str, Any], migration: Migration) -> None:
    tokenizer = old.pop("tokenizer_name_or_path", None)
    if tokenizer is not None:
        if tokenizer == old.get("model_name_or_path"):
            migration.changes.append("`tokenizer_name_or_path` left out: it is the model's")
        else:
            migration.problems.append(
                f"`tokenizer_name_or_path: {tokenizer}`: the tokenizer is always the model's own. Save yours beside the model: "
                f"`AutoTokenizer.from_pretrained({tokenizer!r}).save_pretrained(model_directory)`."
            )
    template = old.pop("chat_template", None)
    if migration.project and isinstance(template, str) and template not in GENERIC_TEMPLATES:
        migration.changes.append(
            f"`chat_template: {template}` left out: the tokenizer's own is used; `trl-ext doctor` shows two rendered rows"
        )
    elif template is not None:
        migration.problems.append(
            "`chat_template`: the template is the tokenizer's. If the tokenizer has none, set `tokenizer.chat_template`, save "
            "tokenizer and model in one directory, and name it in `model_name_or_path`; otherwise remove the key."
        )
    for key, name in WANDB.items():
        if old.get(key) is not None:
            old["env"] = {**(old.get("env") or {}), name: str(old.pop(key))}
            migration.changes.append(f"`{key}` -> `env.{name}`: the tracker reads environment variables")


def _key(key: str, value: Any, old: dict[str, Any], migration: Migration) -> None:
    """Convert a key that no step has removed."""
    advice = {} if migration.project is None else ADVICE | migration.project.advice
    neutral = NEUTRAL | {name: (False, what) for name, what in advice.items()}
    if key == "warmup_ratio":
        if old.get("warmup_steps"):
            migration.changes.append("`warmup_ratio` left out: `warmup_steps` took precedence")
        elif isinstance(value, (int, float)) and 0 <= value < 1:
            migration.recipe["warmup_steps"] = value
            migration.changes.append(
                f"`warmup_ratio` -> `warmup_steps: {value}`: below 1 it is a fraction of all steps"
            )
        else:
            migration.problems.append(f"`warmup_ratio: {value}` is not a fraction below 1. Set `warmup_steps`.")
    elif key in neutral:
        default, what = neutral[key]
        if value in (default, None):
            migration.changes.append(f"`{key}` left out: it had no effect")
        else:
            migration.problems.append(f"{shown(key, value)}: {what}.")
    else:
        migration.recipe[key] = value
        migration.kept.append(key)


def _keep_defaults(old: dict[str, Any], migration: Migration) -> None:
    """Write down old defaults that have changed since, if the recipe relied on them."""
    if not {"bf16", "fp16", "use_cpu"} & migration.recipe.keys():
        migration.recipe["bf16"] = False
        migration.changes.append("`bf16: false` added: TRL's default is bf16 now, and was not then")
    if "dataset_mixer" in old and "optim" not in migration.recipe:
        migration.recipe["optim"] = "rmsprop"
        migration.changes.append("`optim: rmsprop` added: it was the handbook's default")


# The result


def _check(migration: Migration, config_classes: tuple[type, ...], trainer: type) -> None:
    """Move keys that a current recipe does not have, and options that the trainer refuses, from the recipe to the problems."""
    known = [name for cls in config_classes for name in cls.__dataclass_fields__]
    for key in list(migration.recipe):
        if key in LAUNCH_KEYS or key == "env":
            continue
        value = migration.recipe[key]
        if isinstance(value, str) and is_secret((key,), value):
            how = "a secret does not belong in a recipe. Run `hf auth login`, or set HF_TOKEN in the environment."
            _leave_out(migration, key, f"`{key}`: {how}")
            continue
        if key not in known and migration.project is not None and not value:
            del migration.recipe[key]
            migration.changes.append(f"{shown(key, value)} left out: it was off")
            continue
        if key not in known:
            problem = f"{unknown_key(key, known)} It has no counterpart."
            if migration.project is not None:
                problem = (
                    f"{shown(key, value)}: a key of {migration.project.name} that has no counterpart here. Remove it."
                )
            _leave_out(migration, key, problem)
            continue
        problem = _problem(config_classes, key, value)
        if problem and isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
            migration.recipe[key] = float(value)
            migration.changes.append(f"`{key}: {value}` -> a number: without a point, YAML reads it as text")
            problem = _problem(config_classes, key, migration.recipe[key])
        if problem:
            _leave_out(migration, key, problem)
    for key, (accepted, reason) in trainer.refused_options.items():
        if migration.recipe.get(key, accepted) != accepted:
            _leave_out(migration, key, f"`{key}: {migration.recipe[key]}` is not supported: {reason}")
    from ..trainers.tdpo_trainer import LOSS_TYPES as TRAINED_LOSSES
    from ..trainers.tdpo_trainer import READ_LABEL_SMOOTHING

    if "label_smoothing" in migration.recipe and not {*migration.recipe.get("loss_type", ())} & {
        *READ_LABEL_SMOOTHING
    }:
        _leave_out(
            migration,
            "label_smoothing",
            f"`label_smoothing: {migration.recipe['label_smoothing']}`: only {', '.join(READ_LABEL_SMOOTHING)} read it now. For labels that may "
            "be flipped, set `loss_type: robust` beside it.",
        )

    known_losses = (*TRAINED_LOSSES, "sft")
    refused = [name for name in migration.recipe.get("loss_type", ()) if name not in known_losses]
    if refused:
        migration.recipe.pop("loss_weights", None)
        _leave_out(
            migration,
            "loss_type",
            f"`loss_type`: {', '.join(refused)} is not among {', '.join(known_losses)} of {trainer.__name__}.",
        )


def _problem(config_classes: tuple[type, ...], key: str, value: Any) -> str | None:
    try:
        check_keys(Recipe(None, {key: value}, {}), config_classes)
    except RecipeError as error:
        return str(error).removeprefix("command line: ")
    return None


def _leave_out(migration: Migration, key: str, problem: str) -> None:
    del migration.recipe[key]
    if key in migration.kept:
        migration.kept.remove(key)
    migration.problems.append(problem)
