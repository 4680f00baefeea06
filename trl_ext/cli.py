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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__


if TYPE_CHECKING:
    from .aries.config import AriesConfig
    from .recipe import Recipe


# Sub-command -> script in `trl_ext/scripts`
TRAINERS = {"tdpo": "tdpo", "self-refine-dpo": "self_refine_dpo"}

CONTINUE = {
    "aries": ": finished work is kept; the same command continues.",
    **dict.fromkeys(
        TRAINERS, ": `--resume_from_checkpoint true` continues from the last checkpoint, if there is one."
    ),
}

EXAMPLES = """\
examples:
  trl-ext tdpo --config recipes/qwen2.5-7b/tdpo/config_qlora.yaml
  trl-ext tdpo --config recipes/qwen2.5-7b/tdpo/config_full.yaml --accelerate_config fsdp2 --learning_rate 1.0e-6
  trl-ext tdpo --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name pairs.jsonl --output_dir out
  trl-ext aries run recipes/my_rounds.yaml --training.learning_rate 1.0e-6
  trl-ext aries status runs/my_rounds
  trl-ext aries export runs/my_rounds --output my-model --push_to_hub me/my-model
  trl-ext aries compare runs/my_rounds runs/my_rounds-tdpo --output compared.html
  trl-ext aries list
  trl-ext doctor --config recipes/my_rounds.yaml
  trl-ext migrate old_dpo_recipe.yaml --output recipes/new.yaml

`trl-ext tdpo --help` lists every key: TRL's and the method's own."""

# Actions of `aries` on one run -> what they do, and their options in the usage line
ACTIONS = {
    "run": ("start a run, or continue it", "[--quiet] [--log_format FORMAT] "),
    "status": ("show how far a run is, and its scores so far", ""),
    "report": ("write a run's report.html", ""),
    "answers": (
        "write a round's evaluation answers for a judge",
        "[--round N] [--turn K] [--format FORMAT] --output FILE ",
    ),
    "lm-eval": ("run lm-evaluation-harness on a round's model", "[--round N] --tasks TASKS "),
    "export": (
        "save a round's policy as a model or an adapter",
        "[--round N] [--merge | --adapter] --output DIR [--push_to_hub REPO [--private]] ",
    ),
    "pairs": ("save the pairs of all rounds as a dataset", "--output DIR [--push_to_hub REPO [--private]] "),
}
RUN_HELP = "RUN is the directory of a run, or a recipe. Any key of the recipe can be overridden, as in --rounds 3."


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-ext",
        description="Token-level DPO, self-refined DPO and the ARIES self-refinement loop, on top of TRL.",
        epilog=EXAMPLES,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32),
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"trl-ext {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", title="commands")
    commands.add_parser("tdpo", help="train with token-level DPO", add_help=False)
    commands.add_parser("self-refine-dpo", help="train with self-refined DPO or IPO", add_help=False)
    add_aries(
        commands.add_parser("aries", help="rounds of generation, self-refinement and training", allow_abbrev=False)
    )
    add_doctor_and_migrate(commands)
    completion = commands.add_parser(
        "completion",
        help="print a script that completes commands, flags and keys in your shell",
        description="Print a completion script, for example: trl-ext completion bash > ~/.trl-ext.bash",
        allow_abbrev=False,
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish", "tcsh"))
    return parser


def add_aries(parser: argparse.ArgumentParser) -> None:
    """
    The actions of `trl-ext aries`. RUN is not a positional argument of argparse, which would take the value of an override for it;
    [`named_run`] finds it.
    """
    actions = parser.add_subparsers(dest="action", metavar="action", title="actions", required=True)
    for name, (meaning, options) in ACTIONS.items():
        description = f"{meaning[:1].upper()}{meaning[1:]}. {RUN_HELP}"
        action = actions.add_parser(name, help=meaning, description=description, allow_abbrev=False)
        passed = " [-- LM_EVAL_ARGS ...]" if name == "lm-eval" else ""
        action.usage = f"trl-ext aries {name} RUN {options}[--section.key value ...]{passed}"
        action.add_argument("--config", metavar="RECIPE", help="another way to name the recipe")
    compare = actions.add_parser(
        "compare",
        help="put runs side by side",
        description="Put runs side by side. RUN is the directory of a run, or a recipe.",
        allow_abbrev=False,
    )
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="at least two; the first is the baseline")
    compare.add_argument("--output", type=Path, metavar="FILE.html", help="also write the comparison as a page")
    listing = actions.add_parser(
        "list",
        help="list the runs in a directory",
        description="List the runs in a directory, and write its index.html.",
        allow_abbrev=False,
    )
    listing.add_argument(
        "directory", type=Path, nargs="?", default=Path("runs"), metavar="DIR", help="by default runs"
    )

    run, answers, lm_eval, export, pairs = (
        actions.choices[name] for name in ("run", "answers", "lm-eval", "export", "pairs")
    )
    run.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    run.add_argument("--log_format", choices=("text", "json"), default="text", help="json: one object per line")
    for action, default in ((answers, "evaluated"), (lm_eval, "trained"), (export, "finished")):
        action.add_argument("--round", type=int, metavar="N", help=f"the round; by default the last {default} one")
    answers.add_argument("--turn", type=int, default=1, metavar="K", help="the answer; by default 1, the direct one")
    answers.add_argument(
        "--format", choices=("alpaca_eval", "jsonl"), default="alpaca_eval", help="format of the file"
    )
    answers.add_argument("--output", type=Path, required=True, metavar="FILE", help="the file to write")
    lm_eval.add_argument("--tasks", required=True, help="tasks of lm-evaluation-harness, separated by commas")
    for action in (export, pairs):
        action.add_argument("--output", type=Path, required=True, metavar="DIR", help="the directory to make")
        action.add_argument("--push_to_hub", metavar="REPO", help="also upload it to this repository, `user/name`")
        action.add_argument("--private", action="store_true", help="make a new repository private")
    form = export.add_mutually_exclusive_group()
    for flag, value, meaning in (
        ("--merge", "merged", "merge the adapter into the base, in the checkpoint's data type (default)"),
        ("--adapter", "adapter", "save the adapter alone"),
    ):
        form.add_argument(flag, dest="form", action="store_const", const=value, help=meaning)


def add_doctor_and_migrate(commands: "argparse._SubParsersAction") -> None:
    meaning = "Check the installation, the machine and, with --config, a recipe. Nothing is trained."
    doctor = commands.add_parser("doctor", help="check the installation, or a recipe", description=meaning)
    doctor.usage = "trl-ext doctor [--config RECIPE] [--start-vllm] [--probe] [--section.key value ...]"
    doctor.add_argument("--config", type=Path, metavar="RECIPE", help="a recipe of a trainer or of ARIES")
    doctor.add_argument("--start-vllm", action="store_true", help="start vLLM on a tiny model, and generate")
    doctor.add_argument("--probe", action="store_true", help="run a little of the recipe to estimate its time")
    migrate = commands.add_parser(
        "migrate",
        help="turn a DPO recipe of another project, or an older one, into a current one",
        description="Turn a DPO recipe of alignment-handbook, axolotl, LLaMA-Factory, RLHFlow or older TRL into a current one, "
        "and list every change.",
        allow_abbrev=False,
    )
    migrate.add_argument("old", type=Path, metavar="OLD_RECIPE", help="a YAML file")
    migrate.add_argument(
        "--method", choices=tuple(TRAINERS), default="tdpo", help="method of the new recipe (default: tdpo)"
    )
    migrate.add_argument("--output", type=Path, metavar="FILE", help="the file to write (default: stdout)")


def split_passed_args(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """This command line, and what `aries lm-eval` passes on: everything after a bare `--`."""
    argv = list(argv)
    end = argv.index("--") if argv[:2] == ["aries", "lm-eval"] and "--" in argv else len(argv)
    return argv[:end], argv[end + 1 :]


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
    from .terminal import printable

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
    named, overrides = named_run(args, unknown)
    if args.action == "report" and Path(named).is_dir() and not overrides:  # even if its recipe is of another version
        from .aries.results.report import report

        return report(Path(named))

    from .recipe import apply_overrides, export_env, parse_section

    recipe = export_env(apply_overrides(read_named(named), overrides))

    from .aries.children import ChildError
    from .aries.config import AriesConfig
    from .terminal import printable

    config = parse_section(recipe, AriesConfig)
    try:
        return act(args, config, recipe, passed)
    except ChildError as error:
        print(printable(f"error: {error}"), file=sys.stderr)  # noqa: T201
        return 1


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
        case "pairs":
            from .aries.results.pairs_dataset import export_pairs

            return export_pairs(config, args.output, args.push_to_hub, args.private)
        case _:
            from .aries.rounds import run

            return run(config, recipe, log_format=args.log_format, quiet=args.quiet)


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
