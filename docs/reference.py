"""
Writes the two pages that are made from the code: `docs/recipe_keys.md`, from the dataclasses of the recipes, and `docs/api.md`,
from the docstrings of the public names. `make docs` runs it; `tests/test_docs.py` says when a page is stale.

    python docs/reference.py

Docstrings are in TRL's format; the keys of an ARIES recipe are documented below their fields. Both pages are plain Markdown, so that they read the same in a repository viewer and in the site.
"""

import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo
from trl import DPOConfig

from trl_ext import SelfRefineDPOConfig, SelfRefineDPOTrainer, ShiftedDPOTrainer, TDPOConfig, TDPOTrainer, refine
from trl_ext.aries import config as aries
from trl_ext.kernels.position_kl import LogProbs, PositionKL, log_probs, position_kl
from trl_ext.losses.aries import row_weights
from trl_ext.losses.shifts import self_refine_shifts, tdpo_shifts
from trl_ext.recipe_checks import Section
from trl_ext.trainers.self_refine_dpo_trainer import DataCollatorForSelfRefinement, augment_prompt
from trl_ext.trainers.shifted_dpo_trainer import Pairs, Term


DOCS = Path(__file__).parent
LONGEST_DEFAULT = 40
LONGEST_CALL = 80
SECTION = re.compile(r"^(Args|Parameters|Returns|Raises|Example):$")
# `names (type), names (type):`, over an indented text
TYPED = re.compile(r"([\w, ]+?) \(((?:[^()]|\([^()]*\))*)\)(?:, |:$)")

TRAINERS = (TDPOTrainer, SelfRefineDPOTrainer)
CONFIGS = (TDPOConfig, SelfRefineDPOConfig)
GROUPS = {
    "Trainers": TRAINERS,
    "Configurations": CONFIGS,
    "Refinement": (refine,),
    "A trainer of your own": (ShiftedDPOTrainer, Pairs, Term),
    "Losses": (tdpo_shifts, self_refine_shifts, row_weights),
    "Kernels": (position_kl, log_probs, PositionKL, LogProbs),
    "Data": (augment_prompt, DataCollatorForSelfRefinement),
}
ON_THE_PAGE = {item.__name__ for group in GROUPS.values() for item in group}

RECIPE_KEYS = """\
# Recipes, key by key

<!-- Written by docs/reference.py from the dataclasses; edit those. -->

What each key is, its type and its default. [ARIES](aries.md) explains the method, [running ARIES](running_aries.md) the stages. If a key says "the paper", its value is the paper's;
everything else is our choice.

An unknown key is an error with a "did you mean". Every key is also a flag: `--learning_rate 1.0e-6` in a trainer's recipe,
`--pairs.min_margin 0.5` in an ARIES one. Write `5.0e-7`, since YAML reads `5e-7` as text.
"""

ARIES_KEYS = """\
## ARIES recipes

For `trl-ext aries`. At the top level, beside [`env`](running_aries.md#environment-variables):
"""

TRAINER_KEYS = """\
## Trainer recipes

For `trl-ext tdpo` and `trl-ext self-refine-dpo`: one flat mapping over TRL's
[`ScriptArguments`](https://huggingface.co/docs/trl/script_utils), the method's config, which is
[`DPOConfig`](https://huggingface.co/docs/trl/dpo_trainer#trl.DPOConfig) with the keys below,
[`ModelConfig`](https://huggingface.co/docs/trl/model_utils) and `DatasetMixtureConfig`. `trl-ext tdpo --help` prints all of
them. The launcher's keys, such as `accelerate_config` and `num_processes`, and `env` are in
[recipes/README.md](../recipes/README.md#launch).
"""

API = """\
# API

<!-- Written by docs/reference.py from the docstrings; edit those. -->

The public names of `trl_ext` are the two trainers, their configurations, the base class for trainers of your own, and `refine`. Losses and kernels are plain functions over
tensors; they are here for those who write a trainer of their own. B is the number of pairs.
"""


# Docstrings


def sections(item: type | types.FunctionType) -> dict[str, str]:
    """The parts of a docstring by their heading; the text before the first one is under an empty heading."""
    found, heading = {"": []}, ""
    for line in inspect.getdoc(item).splitlines():
        match = SECTION.match(line)
        if match:
            heading = match.group(1).replace("Args", "Parameters")
            found[heading] = []
        else:
            found[heading].append(line)
    return {heading: textwrap.dedent("\n".join(lines)).strip() for heading, lines in found.items()}


def entries(text: str) -> Iterator[tuple[list[str], str, str]]:
    """Names, types and text of each entry of `Parameters`; names that share a line share its text."""
    for head, body in re.findall(r"^(\S.*:)\n((?:    .*(?:\n|\Z)|\n)*)", text + "\n", flags=re.MULTILINE):
        for names, spec in TYPED.findall(head) or [(head.rstrip(":"), "")]:
            yield re.split(r",\s*", names.strip()), spec, " ".join(body.split())


def parameters(item: type | types.FunctionType) -> Iterator[tuple[list[str], str, str]]:
    """The entries of `Parameters`; a class has those of its bases in this package too, after its own."""
    seen = set()
    for owner in inspect.getmro(item) if isinstance(item, type) else (item,):
        if owner.__module__.startswith("trl_ext"):
            for names, spec, text in entries(sections(owner).get("Parameters", "")):
                if not seen & set(names):
                    seen |= set(names)
                    yield names, spec, text


def in_words(text: str) -> str:
    """References of TRL's docstrings as links where the page has the name, as code otherwise."""

    def reference(match: re.Match) -> str:
        name = match.group(1).lstrip("~").rpartition(".")[2]
        return f"[`{name}`](api.md#{name.lower()})" if name in ON_THE_PAGE else f"`{name}`"

    text = re.sub(r"\[`([\w.~]+)`\](?!\()", reference, text)
    return re.sub(r"(?<!\]\()(https://huggingface\.co/papers/([\d.]+\d))", r"[\2](\1)", text)


def cell(text: str) -> str:
    return in_words(" ".join(text.split())).replace("|", r"\|")


# Recipes


def type_name(kind: type, choices: typing.Collection[str] = ()) -> str:
    """A type as one writes it into YAML."""
    if choices:
        return "one of " + ", ".join(f"`{value}`" for value in choices)
    if typing.get_origin(kind) is typing.Literal:
        return type_name(str, typing.get_args(kind))
    if typing.get_origin(kind) is typing.Annotated:
        one = "text or " if any(isinstance(item, BeforeValidator) for item in kind.__metadata__) else ""
        return one + type_name(kind.__origin__) + bounds(kind.__metadata__)
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join(type_name(part) for part in typing.get_args(kind) if part is not types.NoneType)
    if typing.get_origin(kind) is list:
        return f"list, each {type_name(typing.get_args(kind)[0])}"
    if typing.get_origin(kind) is dict:
        return "mapping"
    if dataclasses.is_dataclass(kind):
        return f"section [{kind.__name__.removesuffix('Config').lower()}](#{kind.__name__.removesuffix('Config').lower()})"
    return {str: "text", int: "integer", float: "number", bool: "true or false"}[kind]


def bounds(metadata: tuple) -> str:
    constraints = [item for part in metadata for item in (part.metadata if isinstance(part, FieldInfo) else [part])]
    signs = {Gt: ("gt", ">"), Ge: ("ge", "≥"), Lt: ("lt", "<"), Le: ("le", "≤")}
    named = [(*signs[type(item)], item) for item in constraints if type(item) in signs]
    words = " and ".join(f"{sign} {getattr(item, name)}" for name, sign, item in named)
    return f" {words}" if words else ""


def default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return "optional"
    if field.default is dataclasses.MISSING:
        return "**required**"
    if field.default is None:
        return "none"
    if isinstance(field.default, str) and len(field.default) > LONGEST_DEFAULT:
        return "below"
    value = str(field.default).lower() if isinstance(field.default, bool) else field.default
    return f"`{value}`"


def keys_table(config: type, leave_out: typing.Collection[str] = (), prefix: str = "") -> str:
    """A table of a dataclass's fields with their documentation, and long texts that are defaults below it."""
    hints, texts = typing.get_type_hints(config, include_extras=True), documentation(config)
    rows, long_texts = ["| key | default | |", "|---|---|---|"], []
    for field in dataclasses.fields(config):
        if field.name in leave_out:
            continue
        kind, value = type_name(hints[field.name], field.metadata.get("choices", ())), default(field)
        rows.append(f"| `{field.name}` | {value} | *{kind}.* {cell(texts[field.name])} |")
        if value == "below":
            long_texts.append(f"Default of `{prefix}{field.name}`:\n\n```text\n{field.default}\n```\n")
    return "\n".join([*rows, "", *long_texts])


def documentation(config: type) -> dict[str, str]:
    """The text of each field: below it in a recipe's section, and in the docstring of a trainer's config."""
    if not issubclass(config, Section):
        return {name: text for names, _, text in parameters(config) for name in names}
    texts = {
        name: (sections(hint)[""].partition(". ")[0].rstrip(".") + ".")
        for name, hint in typing.get_type_hints(config).items()
        if dataclasses.is_dataclass(hint)
    }
    for cls in reversed(config.__mro__):
        for name, field in getattr(cls, "__pydantic_fields__", {}).items():
            texts |= {name: field.description} if field.description else {}
    return texts


def recipe_keys() -> str:
    parts = [RECIPE_KEYS, ARIES_KEYS, keys_table(aries.AriesConfig)]
    shared = {field.name for field in dataclasses.fields(aries.ScoresConfig)}
    configs = typing.get_type_hints(aries.AriesConfig) | {"training": aries.LoopConfig}
    for name, config in configs.items():
        if dataclasses.is_dataclass(config):
            parts += keys_section(name, config)
        if config is aries.PromptsConfig:
            parts += keys_section("dataset", aries.DatasetConfig)
        if config is aries.ScoresConfig:
            parts += keys_section("judge", aries.JudgeConfig)
            parts += keys_section("scorer", aries.ScorerConfig, shared)
    parts.append(TRAINER_KEYS)
    inherited = {field.name for field in dataclasses.fields(DPOConfig)}
    for config in CONFIGS:
        command = {"TDPOConfig": "tdpo", "SelfRefineDPOConfig": "self-refine-dpo"}[config.__name__]
        parts += [f"### `trl-ext {command}`\n", keys_table(config, leave_out=inherited)]
    return "\n".join(parts)


def keys_section(name: str, config: type, leave_out: typing.Collection[str] = ()) -> list[str]:
    return [f"### `{name}`\n", in_words(sections(config)[""]) + "\n", keys_table(config, leave_out, f"{name}.")]


# Python


def api() -> str:
    parts = [API]
    for group, items in GROUPS.items():
        parts.append(f"## {group}\n")
        for item in items:
            parts += [f"### {item.__name__}\n", *described(item)]
    return "\n".join(parts)


def described(item: type | types.FunctionType) -> Iterator[str]:
    yield f"```py\n{signature(item)}\n```\n"  # no ```python block: those are programs, and the tests run them
    found = sections(item)
    yield in_words(found[""]) + "\n"
    rows = [
        f"| {', '.join(f'`{name}`' for name in names)} | {cell(f'{spec}. {text}')} |"
        for names, spec, text in parameters(item)
    ]
    if rows:
        yield "\n".join(["| parameter | |", "|---|---|", *rows, ""])
    if isinstance(item, type) and issubclass(item, tuple):
        yield f"Fields: {', '.join(f'`{name}`' for name in item._fields)}.\n"
    for heading in ("Returns", "Raises"):
        if heading in found:
            yield f"**{heading}** {in_words(found[heading])}\n"
    if "Example" in found:
        yield found["Example"].replace("```python", "```pycon") + "\n"


def signature(item: type | types.FunctionType) -> str:
    """How it is imported and called. Trainers and configurations take what TRL's take."""
    line = f"from {'trl_ext' if item in (*TRAINERS, *CONFIGS, ShiftedDPOTrainer, refine) else item.__module__} import {item.__name__}"
    if isinstance(item, type):
        return line
    parameters, star = [], False
    for parameter in inspect.signature(item).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            parameters.append("*")
            star = True
        value = f'"{parameter.default}"' if isinstance(parameter.default, str) else repr(parameter.default)
        parameters.append(parameter.name + ("" if parameter.default is parameter.empty else f"={value}"))
    call = f"{item.__name__}({', '.join(parameters)})"
    if len(call) > LONGEST_CALL:
        call = f"{item.__name__}(\n    " + ",\n    ".join(parameters) + ",\n)"
    return f"{line}\n\n{call}"


def pages() -> dict[str, str]:
    """The pages by their names in `docs/`."""
    return {name: text.rstrip() + "\n" for name, text in (("recipe_keys.md", recipe_keys()), ("api.md", api()))}


if __name__ == "__main__":
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")
