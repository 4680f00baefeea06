"""
What a recipe's keys and values must be, and the words for what they are not.

In: one value and the type hint of its field, or a key nobody knows. Out: the value, or a [`RecipeError`] whose message says
what is expected, what was found and how to write it. Where it was written is `recipe.py`'s to add.
"""

import difflib
import json
import math
import re
import types
import typing
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from pydantic import PydanticUserError, TypeAdapter, ValidationError


# Read by `trl-ext` itself, which hands them to `accelerate launch`; the other options belong in the accelerate config
LAUNCH_KEYS = (
    "accelerate_config",
    "num_processes",
    "num_machines",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
)

# Keys of earlier TRL, transformers and alignment-handbook recipes, and what takes their place
_DATASETS = (
    "list the data under `datasets:`, each with `path` and, where needed, `name`, `split`, `columns`, `fraction`"
)
_RENAMED = {
    "torch_dtype": "it is called `dtype` now",
    "warmup_ratio": "use `warmup_steps`: below 1 it is a fraction of all steps, so `warmup_ratio: 0.1` is `warmup_steps: 0.1`",
    "max_prompt_length": "it is gone: `max_length` bounds prompt and answer together",
    "max_completion_length": "it is gone: `max_length` bounds prompt and answer together",
    "dataset_mixer": _DATASETS,
    "dataset_mixture": _DATASETS,
    "dataset_splits": "use `dataset_train_split` and `dataset_test_split`",
    "evaluation_strategy": "it is called `eval_strategy` now",
    "overwrite_output_dir": "it is gone: remove it",
    "preprocessing_num_workers": "it is called `dataset_num_proc` now",
    "no_cuda": "it is called `use_cpu` now",
    "logging_dir": "it is gone: trackers take their directory from their own environment variables, under `env:`",
}
_RENAMED_IN_DATASETS = {
    "id": "it is called `path` now",
    "config": "it is called `name` now",
    "weight": "slice the split, `split: train[:50%]`; TRL's `fraction` is another thing, a share of the whole mixture",
}


# Of Hugging Face, of OpenAI and those who imitate it
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}")
# What keys of a recipe that hold a secret end in; `eos_token` and `pad_token` are none
_SECRET_KEYS = ("api_key", "hub_token", "hf_token", "auth_token", "access_token", "secret_key", "_secret", "_password")

# Of a whole number
_LARGEST_BITS = 1024


class RecipeError(ValueError):
    """Bad input: a recipe, a flag or a data file. The message is for the user; the CLI prints it without traceback."""


def check_value(value: Any, hint: Any, choices: Iterable | None = None) -> Any:
    """
    Check one value against a type hint, strictly: no text for a number, no number for a switch.

    Three things are more lenient, as in TRL: a whole number is a number, a single text stands for a list of one, and an
    enum takes its values. A hint that pydantic has no schema for accepts everything.

    Raises:
        [`RecipeError`]: what the value must be, what it is, and how to write it; the caller adds where.
    """
    members = union_members(hint)
    choices = list(choices or _choices(hint))
    if choices and isinstance(value, str) and value not in choices:
        allowed = ", ".join(repr(choice) for choice in choices)
        raise RecipeError(f"must be one of {allowed}; got {value!r}.{did_you_mean(value, choices)}")
    if isinstance(value, str) and str not in members and list[str] in members:
        return [value]
    try:
        return _validate(value, hint)
    except PydanticUserError:
        return value
    except ValidationError as error:
        message = f"must be {_expected(hint)}, got {show(value)}.{_way_out(value, members)}"
        raise RecipeError(message) from error


def _choices(hint: Any) -> tuple:
    """The texts a hint allows: a `Literal`'s, or those of the enum that transformers declares as `Enum | str`."""
    members = [member for member in union_members(hint) if member is not types.NoneType]
    if len(members) == 1 and typing.get_origin(members[0]) is typing.Literal:
        return typing.get_args(members[0])
    enums = [member for member in members if isinstance(member, type) and issubclass(member, Enum)]
    return tuple(choice.value for choice in enums[0]) if enums else ()


def _validate(value: Any, hint: Any) -> Any:
    adapter = TypeAdapter(hint)
    try:
        return adapter.validate_python(value, strict=True)
    except ValidationError:
        # A JSON document, unlike a Python object, may hold text for a path or an enum, and a list for a tuple
        try:
            document = json.dumps(value)
        except TypeError:  # a date
            document = ""
        if not document or json.loads(document) != value:  # JSON has no number as a key
            raise
        return adapter.validate_json(document, strict=True)


def union_members(hint: Any) -> tuple:
    """`(int, NoneType)` for `int | None`, `(int,)` for `int`."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "a mapping",
    Path: "a path",
}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts", Path: "paths"}


def _expected(hint: Any) -> str:
    members = [member for member in union_members(hint) if member is not types.NoneType]
    if len(members) > 1:
        return " or ".join(_expected(member) for member in members)
    (core,) = members
    origin, args = typing.get_origin(core), typing.get_args(core)
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(choice) for choice in args)
    if isinstance(core, type) and issubclass(core, Enum):
        return "one of " + ", ".join(repr(choice.value) for choice in core)
    if origin in (list, tuple, set) or core in (list, tuple, set):
        return "a list" + (f" of {_PLURALS[args[0]]}" if args and args[0] in _PLURALS else "")
    return _NAMES.get(origin or core, getattr(core, "__name__", str(core)))


def show(value: Any) -> str:
    """A value in words, shortened."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value.bit_length() > _LARGEST_BITS:  # Python may refuse to print it
        return f"a number of {value.bit_length():,} bits"
    kind = {str: "the text ", list: "the list ", dict: "the mapping "}.get(type(value), "")
    shown = repr(value) if isinstance(value, (str, int, float, list, dict)) else str(value)
    return kind + (shown if len(shown) <= 80 else shown[:77] + "...")


def unwritable(value: Any) -> str | None:
    """What keeps a value, or one inside it, from being used, or from being written down and read again; or `None`."""
    if isinstance(value, dict):
        return next(filter(None, map(unwritable, (*value, *value.values()))), None)
    if isinstance(value, (list, tuple, set)):
        return next(filter(None, map(unwritable, value)), None)
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= character <= "\udfff" for character in value)):
        return "a text with a NUL character or half a Unicode character, which no file can hold. Remove it."
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be a finite number; found {value}. Write a number, or leave the key out."
    if isinstance(value, int) and value.bit_length() > _LARGEST_BITS:
        return f"a number of more than {_LARGEST_BITS} bits. Write a smaller one."
    return None


def is_secret(keys: tuple, value: str) -> bool:
    """
    Whether a text at these keys is a secret, by the form of the token or the name it has. Of the variables under `env`, the last word of
    the name counts: `HF_TOKEN` is one, `TOKENIZERS_PARALLELISM` and `HF_TOKEN_PATH` are not.
    """
    if _TOKEN.fullmatch(value):
        return True
    if value.lower() in ("0", "1", "true", "false", "yes", "no", "on", "off"):  # HF_HUB_DISABLE_IMPLICIT_TOKEN
        return False
    name = str(next((key for key in reversed(keys) if not isinstance(key, int)), "")).lower()
    if keys[0] == "env":
        return name.rpartition("_")[2] in ("token", "secret", "password", "passwd", "key", "apikey")
    return name in ("token", "secret", "password") or name.endswith(_SECRET_KEYS)


def _way_out(value: Any, members: tuple) -> str:
    """How to write what was probably meant, as a sentence with a leading space, or nothing."""
    if isinstance(value, str) and (float in members or int in members):
        try:
            number = float(value)
        except ValueError:
            return ""
        if not math.isfinite(number):
            return ""
        if isinstance(yaml.safe_load(value), (int, float)):
            return " Remove the quotes."
        if float not in members:
            return f" Write `{int(number)}`." if number.is_integer() else ""
        mantissa, _, exponent = f"{number!r}".partition("e")
        written = f"{mantissa if '.' in mantissa else mantissa + '.0'}e{int(exponent):+d}" if exponent else mantissa
        return f" YAML reads `{value}` as text: write `{written}`."
    if isinstance(value, str) and bool in members and value.lower() in ("true", "false", "yes", "no", "on", "off"):
        return " Remove the quotes."
    if isinstance(value, bool) and str in members:
        return " YAML reads a bare `no`, `off`, `yes` or `on` as true or false: put the word in quotes."
    if str in members and value is not None and not isinstance(value, (list, dict)):
        return f' Put it in quotes: "{value}".'
    if not isinstance(value, (list, dict, str, types.NoneType)) and any(typing.get_origin(m) is list for m in members):
        return f" Write `[{value}]`."
    return ""


def unknown_key(key: Any, known: Iterable[str], keys: tuple = (), flag: bool = False) -> str:
    """What to say about a key (or a flag) nobody knows: the section it stands in, its new name, or the closest known one."""
    renamed = _RENAMED_IN_DATASETS if keys[:1] == ("datasets",) else _RENAMED
    kind, dashes = ("flag", "--") if flag else ("key", "")
    message = f"unknown {kind} `{dashes}{key}`" + (f" in `{dotted(keys)}`" if keys else "")
    if key in renamed:
        return f"{message}: {renamed[key]}."
    if flag and key in LAUNCH_KEYS:
        return (
            f"{message}: it is for `trl-ext`, which starts `accelerate launch`; here, give it to `accelerate launch`."
        )
    return f"{message}.{did_you_mean(key, known, dashes)}"


def did_you_mean(name: Any, known: Iterable, prefix: str = "") -> str:
    close = difflib.get_close_matches(str(name), [str(other) for other in known], n=1)
    return f" Did you mean `{prefix}{close[0]}`?" if close else ""


def dotted(keys: tuple) -> str:
    """`("datasets", 0, "path")` as `datasets[0].path`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")
