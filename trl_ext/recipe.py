"""
Recipes: the only place where YAML becomes dataclasses.

In: a YAML file and what the command line adds to it. Out: instances of the dataclasses that the caller names. Everything that is wrong
is in one [`RecipeError`], with its file and line, and what to type instead.

Two shapes: a trainer's recipe is TRL's flat mapping over several dataclasses ([`parse_flat`]); an ARIES recipe has one
section per stage ([`parse_section`]). Deliberately not here: interpolation, includes, inheritance between files.
"""

import copy
import dataclasses
import os
import re
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from .recipe_checks import check_mapping, problems
from .recipe_values import LAUNCH_KEYS, RecipeError, dotted, is_secret, leaves, show, unknown_key, unwritable


COMMAND_LINE = "command line"

# Largest accepted number of values in a recipe, with aliases counted each time they are used
MOST_VALUES = 10_000


@dataclasses.dataclass(frozen=True)
class Recipe:
    """
    A YAML mapping that knows where each key was written.

    Args:
        path (`Path` or `None`):
            The file, or `None` if everything comes from the command line.
        mapping (`dict`):
            What the file says.
        locations (`dict[tuple, str]`):
            `"file:line"` or `"command line"` for each path of keys and list indices.
        env (`dict`, *optional*):
            What [`export_env`] has taken out of the mapping.
    """

    path: Path | None
    mapping: dict
    locations: dict[tuple, str]
    env: dict = dataclasses.field(default_factory=dict)

    def where(self, *keys: str | int) -> str:
        """Where `keys` was written, or else the closest section around it."""
        while keys and keys not in self.locations:
            keys = keys[:-1]
        return self.locations.get(keys, str(self.path or COMMAND_LINE))

    def at(self, *keys: str | int) -> Any:
        """The value at `keys`, or `None` if a section is missing."""
        value = self.mapping
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None if value is None else value[key]
        return value


# Files


def load_yaml(path: str | Path) -> Recipe:
    """
    Read a recipe file.

    Raises:
        [`RecipeError`]: no such file, not YAML, empty, not a mapping, or a key written twice.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a directory, not a recipe file" if path.is_dir() else "no such recipe file"
        near = path if path.is_dir() else path.parent
        found = sorted(str(other) for other in near.glob("*.yaml"))
        raise RecipeError(f"{path}: {what}." + (f" In {near} there is: {', '.join(found)}." if found else ""))
    try:
        content = path.read_bytes()
        loader = yaml.SafeLoader(content.decode("utf-8"))
        node = loader.get_single_node()
        locations = {} if node is None else _locations(node, path)
        mapping = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(
            f"{path}:{line}: not valid YAML: {error.problem}. Look for a missing colon, bracket or quote, or a tab."
        ) from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"{path}:{line}: not UTF-8 text: {error.reason} ({content[error.start]:#04x}). Save the file as UTF-8."
        ) from error
    except (yaml.YAMLError, OSError, RecursionError) as error:
        raise RecipeError(f"{path}: not a YAML text file: {error}") from error
    if mapping is None:
        raise RecipeError(f"{path}: the file is empty. A recipe holds lines such as `learning_rate: 5.0e-7`.")
    if not isinstance(mapping, dict):
        raise RecipeError(f"{path}:1: a recipe is a mapping of `key: value` lines; this is {show(mapping)}.")
    return Recipe(path, mapping, locations)


def _locations(node: yaml.Node, path: Path, keys: tuple = ()) -> dict[tuple, str]:
    """
    `"file:line"` of every path of keys. A key that is written twice is an error, though YAML would silently take the last one; so are
    aliases of aliases, which make a few lines a tree too large to walk.
    """
    locations = {}
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node, path, keys)
    if isinstance(node, yaml.MappingNode):
        for key, child in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name = _check_scalar(key, path, keys) if key.id == "scalar" else str(key.value)
            here = (*keys, name)
            if here in locations:
                raise RecipeError(
                    f"{path}:{key.start_mark.line + 1}: `{dotted(here)}` is written twice, first at {locations[here]}. "
                    "Keep one."
                )
            locations[here] = f"{path}:{key.start_mark.line + 1}"
            locations |= _locations(child, path, here)
    elif isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            locations[(*keys, index)] = f"{path}:{child.start_mark.line + 1}"
            locations |= _locations(child, path, (*keys, index))
    if len(locations) > MOST_VALUES:
        raise RecipeError(
            f"{path}:{node.start_mark.line + 1}: more than {MOST_VALUES:,} values. No recipe has so many: look for aliases (`*name`) "
            "of lists of aliases."
        )
    return locations


def _check_scalar(node: yaml.ScalarNode, path: Path, keys: tuple) -> Any:
    """The value of a scalar. For `!!int x` or a 30th of February, PyYAML lets through any error of its conversion."""
    try:
        value = yaml.SafeLoader("").construct_object(node, deep=True)
    except yaml.YAMLError:
        raise
    except Exception as error:
        kind = node.tag.rpartition(":")[2]
        raise RecipeError(
            f"{path}:{node.start_mark.line + 1}: `{dotted(keys)}`: YAML cannot read {show(node.value)} as {kind} ({error}). Put text "
            "in quotes."
        ) from error
    problem = unwritable(value)
    if problem:
        raise RecipeError(f"{path}:{node.start_mark.line + 1}: `{dotted(keys)}`: {problem}")
    return value


def export_env(recipe: Recipe) -> Recipe:
    """
    Put the recipe's `env:` into `os.environ`, as TRL does, and return the recipe without it.

    Raises:
        [`RecipeError`]: `env` is not a mapping of names to values, or the recipe holds a secret: recipes are copied, shared and
            committed.
    """
    env = recipe.mapping.get("env", {})
    if not isinstance(env, dict):
        raise RecipeError(f"{recipe.where('env')}: `env` must be a mapping of names to values, got {show(env)}.")
    _refuse_secrets(recipe)
    for name, value in env.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", str(name), re.ASCII):
            raise RecipeError(
                f"{recipe.where('env', name)}: `env` has {show(name)}, which is not the name of a variable."
            )
        if value is None or isinstance(value, (dict, list)):
            raise RecipeError(f"{recipe.where('env', name)}: `env.{name}` must be one value, got {show(value)}.")
    for name, value in env.items():
        os.environ[name] = str(value)
    return dataclasses.replace(recipe, mapping={k: v for k, v in recipe.mapping.items() if k != "env"}, env=env)


def _refuse_secrets(recipe: Recipe) -> None:
    """The error names the key and never shows the value."""
    for keys, value in leaves(recipe.mapping):
        if isinstance(value, str) and value and is_secret(keys, value):
            name = (
                "HF_TOKEN"
                if "hub_token" in keys
                else keys[-1]
                if keys[0] == "env"
                else "the variable that is meant for it"
            )
            raise RecipeError(
                f"{recipe.where(*keys)}: `{dotted(keys)}` is a secret, and recipes are copied and shared. Remove the line, and export "
                f"{name} in the shell instead."
            )


# Command line


def take_flag(args: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """Take `--name value` or `--name=value` out of `args`: the last value given, and the arguments left."""
    value, rest, tokens = None, [], iter(args)
    for token in tokens:
        flag, equals, text = token.partition("=")
        if flag not in (f"--{name}", f"--{name.replace('_', '-')}"):
            rest.append(token)
        elif (value := text if equals else next(tokens, None)) is None or (not equals and value.startswith("--")):
            raise RecipeError(f"{COMMAND_LINE}: `--{name}` needs a value.")
    return value, rest


def apply_overrides(recipe: Recipe, overrides: Iterable[str]) -> Recipe:
    """
    Overrides for a recipe with sections: `--training.learning_rate 1.0e-4`, `--training.learning_rate=1.0e-4`, or a bare
    `--training.bf16` for true. A value is a YAML scalar, or a list or mapping in brackets; `1e-4` is a number here.

    Example:

    ```python
    >>> apply_overrides(Recipe(None, {"training": {"beta": 0.1}}, {}), ["--training.beta", "0.5"]).mapping
    {'training': {'beta': 0.5}}
    ```
    """
    mapping, locations = copy.deepcopy(recipe.mapping), dict(recipe.locations)
    tokens = list(overrides)
    while tokens:
        flag, equals, text = tokens.pop(0).partition("=")
        if not (flag.startswith("--") or equals):
            raise RecipeError(f"{COMMAND_LINE}: unexpected argument `{flag}`. Overrides are `--section.key value`.")
        if not equals:
            text = "true" if not tokens or tokens[0].startswith("--") else tokens.pop(0)
        keys = tuple(flag.removeprefix("--").replace("-", "_").split("."))
        section = mapping
        for depth, key in enumerate(keys[:-1], start=1):
            if section.get(key) is None:
                section[key] = {}
                locations.setdefault(keys[:depth], COMMAND_LINE)
            section = section[key]
            if not isinstance(section, dict):
                raise RecipeError(
                    f"{COMMAND_LINE}: `{flag}`: `{'.'.join(keys[:depth])}` is {show(section)}, not a section."
                )
        section[keys[-1]] = _override_value(flag, text)
        locations[keys] = COMMAND_LINE
    return Recipe(recipe.path, mapping, locations)


def _override_value(flag: str, text: str) -> Any:
    try:
        loader = yaml.SafeLoader(text)
        if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", text):
            value = float(text)
        elif text[:1] in ("[", "{", "'", '"') and text[:2] not in (
            "{{",
            "{%",
        ):  # how a template begins, and no mapping
            value = loader.get_single_data()
        else:  # not as a document: "Query: " in a prompt is text, not a mapping
            tag = loader.resolve(yaml.ScalarNode, text, (True, False))
            value = loader.construct_object(yaml.ScalarNode(tag, text))
    except Exception as error:  # PyYAML's own, or any error of its conversion of a scalar
        raise RecipeError(f"{COMMAND_LINE}: `{flag}`: not a YAML value: {text}") from error
    problem = unwritable(value)
    if problem:
        raise RecipeError(f"{COMMAND_LINE}: `{flag}`: {problem}")
    return value


# Dataclasses


def parse_section(recipe: Recipe, cls: type, keys: tuple = ()) -> Any:
    """
    Build `cls`, a [`~recipe_values.section`], from the section at `keys` (the whole recipe by default).

    Raises:
        [`RecipeError`]: everything that is wrong, one problem per line.
    """
    return _checked(recipe, TypeAdapter(cls).validate_python, (cls,), keys)


def check_keys(recipe: Recipe, classes: Iterable[type], keys: tuple = (), also: Iterable[str] = ()) -> dict[str, Any]:
    """
    The checked values of the mapping at `keys`, whose keys are the fields of `classes`; those in `also` are left out.
    Nothing is built, except nested dataclasses.
    """
    classes = tuple(classes)
    return _checked(recipe, lambda section: check_mapping(section, classes), classes, keys, tuple(also))


def _checked(
    recipe: Recipe, check: Callable, classes: tuple[type, ...], keys: tuple, also: tuple[str, ...] = ()
) -> Any:
    section = recipe.at(*keys)
    if not isinstance(section, dict | None):
        raise RecipeError(
            f"{recipe.where(*keys)}: `{dotted(keys)}` must be a mapping of `key: value` lines, got {show(section)}."
        )
    section = {key: value for key, value in (section or {}).items() if key not in also}
    try:
        return check(section)
    except ValidationError as error:
        # Its own text would show the values, some of which may be secret
        found = problems(error, section, classes, keys, also)
        raise RecipeError("\n".join(f"{recipe.where(*place)}: {text}" for place, text in found)) from None


def parse_flat(
    path: str | Path | Recipe | None, classes: Sequence[type], overrides: Sequence[str] = (), prog: str | None = None
) -> tuple:
    """
    TRL's flat recipe: one mapping over the fields of several dataclasses. Defaults < recipe < command line.

    Args:
        path (`str`, `Path`, [`Recipe`] or `None`):
            The recipe; `None` if there is only the command line.
        classes (`Sequence[type]`):
            The dataclasses, as for [`~trl.TrlParser`].
        overrides (`Sequence[str]`, *optional*):
            Command-line arguments, with the spellings of [`~trl.TrlParser`]. Abbreviated flags are unknown flags.
        prog (`str`, *optional*):
            Name of the program in `--help`.

    Returns:
        `tuple`: one instance per class.

    Raises:
        [`RecipeError`]: an unknown key or flag, a value of the wrong type, or what a `__post_init__` refused.
    """
    from trl import TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> typing.NoReturn:
            raise RecipeError(f"{COMMAND_LINE}: {message}")

    recipe = path if isinstance(path, Recipe) else Recipe(None, {}, {}) if path is None else load_yaml(path)
    recipe = export_env(recipe)
    values = check_keys(recipe, classes, also=LAUNCH_KEYS)
    parser = Parser(list(classes), prog=prog, allow_abbrev=False)
    parser.set_defaults_with_config(**values)
    _, unknown = parser.parse_known_args(list(overrides))
    if unknown:
        flags = [token.partition("=")[0].removeprefix("--") for token in unknown if token.startswith("--")]
        known = [field.name for cls in classes for field in dataclasses.fields(cls)]
        found = [unknown_key(flag.replace("-", "_"), known, flag=True) for flag in flags]
        found = found or [f"unexpected argument `{unknown[0]}`. Options are `--key value`."]
        raise RecipeError("\n".join(f"{COMMAND_LINE}: {text}" for text in found))
    try:
        # TRL would also read a file `trl-ext.args` beside the script
        parsed = parser.parse_args_into_dataclasses(list(overrides), look_for_args_file=False)
    except (ValueError, TypeError, ImportError) as error:
        # transformers names the cause, a bf16 recipe on a machine without a GPU, and half of the fix
        fix = " Add `--use_cpu --bf16 false`." if "assign use_cpu" in str(error) else ""
        raise RecipeError(f"{recipe.where()}: {error}{fix}") from error
    for instance in parsed:
        for field in dataclasses.fields(instance):
            problem = unwritable(getattr(instance, field.name))
            if problem:
                raise RecipeError(f"{COMMAND_LINE}: `--{field.name}` {problem}")
    return parsed
