"""
What a recipe's keys and values must be: the fields of dataclasses, checked by pydantic.

In: a mapping, and the dataclasses whose fields are its keys. Out: checked values, or pydantic's errors, which [`problems`] puts into a
recipe's words: what is expected, what was found and what to type. `recipe.py` adds where each key was written.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from functools import cache
from typing import Annotated, Any, Literal, Union

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError, create_model
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import ArgsKwargs, core_schema

from .recipe_values import SWITCHES, did_you_mean, dotted, show, unknown_key


_STRICT = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)

# Fields declared as text for which the trainer also takes a bare `true`
_TRUE_TOO = ("resume_from_checkpoint", "fsdp")


class Section:
    """
    Base of the dataclasses that are sections of a recipe: they are built from a mapping, and an empty section is its defaults.
    """

    @classmethod
    def from_mapping(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return cls(**{str(key): inner for key, inner in value.items()})
        return cls() if value is None else value

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(source.from_mapping, handler(source))


@typing.dataclass_transform()
def section(cls: type) -> type:
    """
    A dataclass that is a section of a recipe: types are strict, and unknown keys are errors. Each field is documented by the text below it.
    """
    return pydantic_dataclass(cls, config=_STRICT | ConfigDict(use_attribute_docstrings=True))


def _one_as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


# A list of texts; a single text stands for a list of one, as in TRL
Texts = Annotated[list[str], BeforeValidator(_one_as_list)]


def check_mapping(value: Mapping[str, Any], classes: tuple[type, ...]) -> dict[str, Any]:
    """
    The checked values of a mapping whose keys are fields of `classes`, dataclasses of TRL's. They are not built, except nested ones.

    Raises:
        [`pydantic.ValidationError`]: see [`problems`].
    """
    checked = _keys_model(classes).model_validate({str(key): inner for key, inner in value.items()})
    return {key: getattr(checked, key) for key in checked.model_fields_set}


@cache
def _keys_model(classes: tuple[type, ...]) -> type[BaseModel]:
    """The fields of dataclasses as a model of their own: constructing TRL's configs would start accelerate."""
    fields = {}
    for cls in classes:
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if field.init:
                required = field.default is field.default_factory is dataclasses.MISSING
                hint = _as_written(hints[field.name], tuple(field.metadata.get("choices") or ()))
                hint = Literal[True] | hint if field.name in _TRUE_TOO else hint
                fields[field.name] = (hint, ... if required else None)
    return create_model("Keys", __config__=_STRICT, **fields)


def _as_written(hint: Any, choices: tuple[str, ...] = ()) -> Any:
    """A hint for values as YAML has them: an enum by its values, a dataclass as a mapping, a text for a list of one."""
    members = _members(hint)
    enums = [member for member in members if isinstance(member, type) and issubclass(member, Enum)]
    if enums and not choices:
        choices = tuple(choice.value for choice in enums[0])
    if choices:  # transformers declares them as `Enum | str`
        return Union[(Literal[choices], *(member for member in members if member not in (str, *enums)))]
    if len(members) > 1:
        listed = Texts if str not in members else list[str]
        return Union[tuple(listed if member == list[str] else _as_written(member) for member in members)]  # noqa: UP007
    if dataclasses.is_dataclass(hint):
        return Annotated[Any, BeforeValidator(lambda value: hint(**_nested(value, hint)))]
    if typing.get_origin(hint) is list:
        return Texts if hint == list[str] else list[_as_written(typing.get_args(hint)[0])]
    return hint


def _nested(value: Any, cls: type) -> dict[str, Any]:
    return check_mapping(TypeAdapter(dict).validate_python(value), (cls,))


def _members(hint: Any) -> tuple:
    """`(int, NoneType)` for `int | None`, `(int,)` for `int`."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


# What pydantic's errors ask for: a type, and what holds for values of it
_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping of `key: value` lines",
    "dataclass_exact_type": "a mapping of `key: value` lines",
    "literal_error": "one of {expected}",
}
_BOUNDS = {
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "below {lt:g}",
}


def problems(
    error: ValidationError, mapping: Any, classes: tuple[type, ...], section: tuple = (), also: tuple[str, ...] = ()
) -> Iterator[tuple[tuple, str]]:
    """
    Args:
        error ([`pydantic.ValidationError`]):
            What is wrong with `mapping`.
        mapping (`dict`), section (`tuple`):
            The mapping, and its keys in the recipe.
        classes (`tuple[type, ...]`), also (`tuple[str, ...]`):
            The dataclasses whose fields are the known keys, and further known keys.

    Returns:
        `Iterator[tuple[tuple, str]]`: for each problem the keys it is at, and what to say.
    """
    found: dict[tuple, list[dict]] = {}
    for each in error.errors(include_url=False):
        missing = each["loc"][-1:] if each["type"] == "missing" else ()
        found.setdefault(_place(each["loc"], mapping) + missing, []).append(each)
    for keys, errors in found.items():
        inside = any(len(other) > len(keys) and other[: len(keys)] == keys for other in found)
        if inside and errors[0]["type"] in _TYPES:
            continue  # another member of the union fits, but for what is wrong inside
        name, kind, value = f"`{dotted(section + keys)}`", errors[0]["type"], errors[0]["input"]
        if kind == "missing":
            text = f"{name} is missing."
        elif kind in ("extra_forbidden", "unexpected_keyword_argument"):
            text = unknown_key(keys[-1], [*_known(classes, keys[:-1]), *also], section + keys[:-1])
        elif kind == "value_error":
            text = str(errors[0]["ctx"]["error"])
            if not isinstance(value, (dict, ArgsKwargs)):
                text = f"{name} {text}"
            elif named := _named(text, mapping):
                keys = named
            elif section + keys:
                text = f"{name}: {text}"
        else:
            text = f"{name} {_refused(value, errors)}"
        yield section + keys, text


def _place(loc: tuple, mapping: Any) -> tuple:
    """The keys of a pydantic location, which also names members of unions, that are in a mapping."""
    keys = ()
    for part in loc:
        if isinstance(mapping, dict):
            found = [key for key in mapping if str(key) == str(part)]
        else:
            found = [part] if isinstance(mapping, list) and part in range(len(mapping)) else []
        if found:
            keys, mapping = (*keys, found[0]), mapping[found[0]]
    return keys


def _named(text: str, mapping: Any) -> tuple:
    """The first key of the recipe that a text names."""
    for name in re.findall(r"`([\w.\[\]]+)", text):
        parts = tuple(int(part) if part.isdigit() else part for part in re.findall(r"\w+", name))
        if _place(parts, mapping) == parts:
            return parts
    return ()


def _known(classes: Iterable[type], keys: tuple) -> list[str]:
    """The fields of the dataclasses at `keys`."""
    for key in (key for key in keys if isinstance(key, str)):
        classes = [inner for cls in classes for inner in _dataclasses(typing.get_type_hints(cls).get(key))]
    return [field.name for cls in classes for field in dataclasses.fields(cls)]


def _dataclasses(hint: Any) -> list[type]:
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [inner for member in typing.get_args(hint) for inner in _dataclasses(member)]


def _refused(value: Any, errors: list[dict]) -> str:
    """What a value must be, what it is, and how to write what was probably meant."""
    bounds = [each for each in errors if each["type"] not in _TYPES]
    expected = dict.fromkeys(map(_expected, bounds or errors))
    choices = re.findall(r"'([^']*)'", "".join(expected))
    kinds = {each["type"] for each in errors}
    remedy = did_you_mean(value, choices) if choices and isinstance(value, str) else _remedy(value, kinds)
    return f"must be {' or '.join(expected)}, got {show(value)}.{remedy}"


def _expected(error: dict) -> str:
    ctx = error.get("ctx", {})
    if error["type"] == "greater_than" and ctx["gt"] == 0:
        return "positive"
    if "expected" in ctx:
        ctx = {"expected": ctx["expected"].replace(" or ", ", ")}
    words = (_TYPES | _BOUNDS).get(error["type"])
    return words.format(**ctx) if words else error["msg"].removeprefix("Input should be ")


def _remedy(value: Any, kinds: set[str]) -> str:
    """How to write what was probably meant, as a sentence with a leading space, or nothing."""
    if isinstance(value, str) and kinds & {"float_type", "int_type"}:
        try:
            number = float(value)
        except ValueError:
            return ""
        if not math.isfinite(number) or not (number.is_integer() or "float_type" in kinds):
            return ""
        number = number if "float_type" in kinds else int(number)
        return f" YAML reads it as text: write `{yaml.safe_dump(number).split()[0]}`."
    if isinstance(value, str) and "bool_type" in kinds and value.lower() in SWITCHES:
        return " Remove the quotes."
    if isinstance(value, bool) and kinds & {"string_type", "literal_error"}:
        return " YAML reads a bare `no`, `off`, `yes` or `on` as true or false: put the word in quotes."
    if "string_type" in kinds and value is not None and not isinstance(value, (list, dict)):
        return f' Put it in quotes: "{value}".'
    if kinds == {"list_type"} and isinstance(value, (int, float)):
        return f" Write `[{value}]`."
    return ""
