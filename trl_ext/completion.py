"""
Shell completion, by shtab: sub-commands, flags, files, and every recipe key, since each is also a flag.
"""

import argparse
import dataclasses
import typing
from collections.abc import Iterable, Iterator

import shtab

from .trainers.self_refine_dpo_config import SelfRefineDPOConfig
from .trainers.tdpo_config import TDPOConfig


FILES, DIRECTORIES = {"--config", "--prompts", "old", "output", "run", "runs"}, {"--output_dir", "directory"}


def script(parser: argparse.ArgumentParser, shell: str, run_actions: Iterable[str]) -> str:
    """
    Args:
        parser (`argparse.ArgumentParser`):
            The command line's; the keys of recipes are added to it.
        shell (`str`):
            `"bash"`, `"zsh"`, `"fish"` or `"tcsh"`.
        run_actions (iterable of `str`):
            The actions of `aries` that take a run directory or a recipe.

    Returns:
        `str`: the script that the shell reads.
    """
    commands = subparsers(parser)
    add_flags(commands["tdpo"], trainer_keys(TDPOConfig))
    add_flags(commands["self-refine-dpo"], trainer_keys(SelfRefineDPOConfig))
    actions = subparsers(commands["aries"])
    add_flags(actions["run"], aries_keys())
    add_flags(actions["refine"], refine_keys())
    for name in run_actions:
        actions[name].add_argument("run", nargs="?", metavar="RUN")
    for each in (*commands.values(), *actions.values()):
        for action in each._actions:  # where shtab looks for completions
            names = {*action.option_strings, action.dest}
            if names & FILES:
                action.complete = shtab.FILE
            elif names & DIRECTORIES:
                action.complete = shtab.DIRECTORY
    return shtab.complete(parser, shell)


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (found,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return found.choices


def add_flags(parser: argparse.ArgumentParser, keys: Iterable[str]) -> None:
    """Add the keys that the parser does not have yet."""
    for key in dict.fromkeys(keys):
        if f"--{key}" not in parser._option_string_actions:
            parser.add_argument(f"--{key}", metavar="VALUE")


def trainer_keys(config: type) -> Iterator[str]:
    """The keys of a trainer's flat recipe."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

    from .recipe_values import LAUNCH_KEYS

    yield from ("config", *LAUNCH_KEYS)
    for cls in (ScriptArguments, config, ModelConfig, DatasetMixtureConfig):
        yield from names(cls)


def aries_keys() -> Iterator[str]:
    """The dotted keys of an ARIES recipe; `training` has the keys of all trainers."""
    from trl import ModelConfig, SFTConfig

    from .aries.config import LOOP_KEYS, AriesConfig

    sections = {"model": [ModelConfig], "sft": [SFTConfig], "training": [TDPOConfig, SelfRefineDPOConfig]}
    for field in dataclasses.fields(AriesConfig):
        classes = sections.get(field.name, [field.type] if dataclasses.is_dataclass(field.type) else [])
        if not classes:
            yield field.name
        for cls in classes:
            yield from (f"{field.name}.{key}" for key in names(cls))
    yield from ("sft.dataset", *(f"training.{key}" for key in LOOP_KEYS))


def refine_keys() -> Iterator[str]:
    """The dotted keys of `aries refine`."""
    from .aries.config import RefineConfig

    for field in dataclasses.fields(RefineConfig):
        for kind in typing.get_args(field.type) or (field.type,):
            if dataclasses.is_dataclass(kind):
                yield from (f"{field.name}.{key}" for key in names(kind))
    yield "seed"


def names(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]
