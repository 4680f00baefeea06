"""
The `trl-ext` command. It parses, imports what the sub-command needs, and runs it.

Exit code 2 and one `error:` on stderr mean that the recipe, the flags or the data are at fault, 1 that something failed, 128 + n that
signal n ended it (130 is Ctrl-C).

`tdpo` and `self-refine-dpo` run in this process on one device. They run through `accelerate launch` if the recipe, the flags, the
user's own `accelerate config` or a second GPU ask for it.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import ACTIONS, TRAINERS, make_parser, split_passed_args


if TYPE_CHECKING:
    from .aries.config import AriesConfig
    from .recipe import Recipe


CONTINUE = {
    "aries": ": finished work is kept; the same command continues.",
    **dict.fromkeys(
        TRAINERS, ": `--resume_from_checkpoint true` continues from the last checkpoint, if there is one."
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`, by default this process's, and return the exit code."""
    argv, passed = split_passed_args(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    args, unknown = parser.parse_known_args(argv)
    if args.command is None:
        if unknown:
            parser.error(f"unknown arguments: {' '.join(unknown)}")
        parser.print_help()
        return 0

    from .recipe import RecipeError
    from .terminal import printable, quiet_imports

    quiet_imports()
    try:
        with signals_as_exceptions():
            return dispatch(parser, args, argv, unknown, passed)
    except RecipeError as error:
        print(printable(f"error: {error}"), file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt as interrupt:
        number = interrupt.number if isinstance(interrupt, Terminated) else signal.SIGINT
        print(f"interrupted ({number.name}){CONTINUE.get(args.command, '')}", file=sys.stderr)  # noqa: T201
        return 128 + number


def dispatch(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    argv: Sequence[str],
    unknown: Sequence[str],
    passed: Sequence[str],
) -> int:
    """Import what the sub-command needs, and run it."""
    if args.command in TRAINERS:
        return train(args.command, argv[argv.index(args.command) + 1 :])
    if args.command == "doctor":
        from . import doctor

        return doctor.main(args.config, unknown, args.start_vllm, args.probe)
    if args.command == "aries" and args.action in ACTIONS:
        return aries(args, unknown, passed)
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    if args.command == "migrate":
        from . import migrate

        return migrate.main(args.old, args.method, args.output)
    if args.command == "completion":
        from .completion import script

        print(script(parser, args.shell, ACTIONS))  # noqa: T201
        return 0
    if args.action == "init":
        from .new_task import DEFAULT_MODEL, init

        return init(args.directory, args.model or DEFAULT_MODEL, args.text)
    if args.action == "compare":
        from .aries.results.compare import compare

        return compare([run_directory(path) for path in args.runs], args.output)

    from .aries.results.listing import list_runs

    return list_runs(args.directory)


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP. Without a handler they end a process at once, and leave its children behind."""

    def __init__(self, number: signal.Signals):
        super().__init__()
        self.number = number


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Unwind on SIGTERM and SIGHUP as on Ctrl-C. Signals that are ignored, as under `nohup`, stay ignored."""

    def unwind(number: int, frame: object) -> None:
        raise Terminated(signal.Signals(number))

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, unwind)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def named_run(args: argparse.Namespace, unknown: Sequence[str]) -> tuple[str, list[str]]:
    """The run directory or the recipe that an action of `aries` is about, and the overrides behind it."""
    if args.config is not None:
        return args.config, list(unknown)
    if unknown and not unknown[0].startswith("-"):
        return unknown[0], list(unknown[1:])
    from .recipe import RecipeError

    raise RecipeError(
        f"`aries {args.action}` needs a run directory or a recipe. Name it first: trl-ext aries {args.action} runs/my-run"
    )


def read_named(named: str | Path) -> "Recipe":
    """The recipe that is named, or that of a run directory, with what the command line had added to it when the run was started."""
    from dataclasses import replace

    from .recipe import RecipeError, load_yaml

    path = Path(named)
    if not path.is_dir():
        return load_yaml(path)
    if not (path / "recipe.yaml").is_file():
        raise RecipeError(
            f"{path} is not a run directory: it has no recipe.yaml. `trl-ext aries list {path}` lists the runs under it."
        )
    recipe = load_yaml(path / "recipe.yaml")
    return replace(recipe, mapping=recipe.mapping | {"output_dir": str(path)})  # it may have been moved


def run_directory(named: Path) -> Path:
    """A run directory as it is, or the `output_dir` of a recipe."""
    return named if named.is_dir() else Path(str(read_named(named).mapping.get("output_dir")))


def aries(args: argparse.Namespace, unknown: Sequence[str], passed: Sequence[str]) -> int:
    """
    `trl-ext aries`: the loop, its state, or something made of its results. If a stage fails, the error names its log, and the exit code
    is 1.
    """
    if args.action == "refine":
        return reported(lambda: refine(args, unknown))
    named, overrides = named_run(args, unknown)
    if args.action == "report" and Path(named).is_dir() and not overrides:  # even if its recipe is of another version
        from .aries.results.report import report

        return report(Path(named))

    from .recipe import apply_overrides, export_env, parse_section

    recipe = export_env(apply_overrides(read_named(named), overrides))

    from .aries.config import AriesConfig

    config = parse_section(recipe, AriesConfig)
    return reported(lambda: act(args, config, recipe, passed))


def reported(action: Callable[[], int]) -> int:
    """What an action returns, or 1 and its error if a stage failed."""
    from .aries.children import ChildError
    from .terminal import printable

    try:
        return action()
    except ChildError as error:
        print(printable(f"error: {error}"), file=sys.stderr)  # noqa: T201
        return 1


def refine(args: argparse.Namespace, unknown: Sequence[str]) -> int:
    """`trl-ext aries refine`, with a model or with a run."""
    run, overrides = None, list(unknown)
    if args.config is not None or (unknown and not unknown[0].startswith("-")):
        named, overrides = named_run(args, unknown)
        run = run_directory(Path(named))

    from .aries.results.refine import refine_command

    given = {
        "model": None if args.model is None else {"model_name_or_path": args.model},
        "adapter": args.adapter,
        "prompts": {"dataset": args.prompts},
        "refinements": {"turns": args.turns},
    }
    return refine_command(run, args.round, args.select, given, overrides, args.output, args.format, args.quiet)


def act(args: argparse.Namespace, config: "AriesConfig", recipe: "Recipe", passed: Sequence[str]) -> int:
    """Import what the action needs, and run it."""
    match args.action:
        case "status":
            from .aries.results.status import status

            return status(config)
        case "report":
            from .aries.results.report import report

            return report(Path(config.output_dir))
        case "answers":
            from .aries.results.answers import export_answers

            return export_answers(config, args.round, args.turn, args.format, args.output)
        case "lm-eval":
            from .aries.results.harness import lm_eval

            return lm_eval(config, args.round, args.tasks, passed)
        case "export":
            from .aries.results.export import export

            return export(config, args.round, args.output, args.form, args.push_to_hub, args.private)
        case "try-verifier":
            from .aries.scoring.try_verifier import try_verifier

            return try_verifier(config)
        case "pairs":
            from .aries.results.pairs_dataset import export_pairs

            return export_pairs(config, args.output, args.push_to_hub, args.private)
        case _:
            from .aries.rounds import run
            from .aries.run_dir import keep_templates

            return run(keep_templates(config), recipe, log_format=args.log_format, quiet=args.quiet)


def train(command: str, args: Sequence[str]) -> int:
    """`trl-ext tdpo` and `self-refine-dpo`, in this process or through `accelerate launch`."""
    from .recipe import Recipe, export_env, load_yaml, take_flag

    path, _ = take_flag(args, "config")
    recipe = Recipe(None, {}, {}) if path is None else load_yaml(path)
    export_env(recipe)  # before any import that reads it, such as HF_HOME
    launch_args, script_args = split_launch_args(recipe, args)
    script = f"{__package__}.scripts.{TRAINERS[command]}"
    if launch_args is None:
        module = import_module(script)
        if {"-h", "--help"} & set(script_args):
            module.parse_args(script_args, prog=f"trl-ext {command}")
        module.run(script_args)
        return 0

    from .processes import run_launcher

    # One clear error rather than one from each process. A child checks: it initialises CUDA, and this process, which waits until the
    # training is over, must not hold a CUDA context
    code = run_launcher(f"{__package__}.scripts.check", [TRAINERS[command], *script_args])
    if code != 0:
        return code
    return run_launcher("accelerate.commands.launch", ["--quiet", *launch_args, "--module", script, *script_args])


def split_launch_args(recipe: "Recipe", args: Sequence[str]) -> tuple[list[str] | None, list[str]]:
    """
    What goes to `accelerate launch`, `None` if it is not needed, and what goes to the script. The command line overrides the
    recipe.
    """
    from .launch import find_accelerate_config
    from .recipe import take_flag
    from .recipe_values import LAUNCH_KEYS

    rest, given = list(args), {}
    for key in LAUNCH_KEYS:
        value, rest = take_flag(rest, key)
        given[key] = recipe.mapping.get(key) if value is None else value
    name = given.pop("accelerate_config")
    launch_args = [] if name is None else ["--config_file", str(find_accelerate_config(str(name), recipe))]
    launch_args += [token for key, value in given.items() if value is not None for token in (f"--{key}", str(value))]
    launched = "LOCAL_RANK" in os.environ
    if launched or {"-h", "--help"} & set(rest) or not (launch_args or _accelerate_by_default(recipe)):
        return None, rest
    return launch_args, rest


def _accelerate_by_default(recipe: "Recipe") -> bool:
    """Whether a plain `accelerate launch` would do more than run one process on one device."""
    from accelerate.commands.config.config_args import default_config_file

    if os.path.isfile(default_config_file):
        return True

    import torch

    return torch.cuda.device_count() > 1 and not recipe.mapping.get("use_cpu")


if __name__ == "__main__":
    sys.exit(main())
