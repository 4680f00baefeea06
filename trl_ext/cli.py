"""
The `trl-ext` command. It parses, imports what the sub-command needs, and runs it; exit code 2 and one `error:` on stderr mean
that the recipe, the flags or the data are at fault, 1 that something failed, 128 + n that signal n ended it (130 is Ctrl-C).

`tdpo` and `self-refine-dpo` run in this process on one device, and through `accelerate launch` where the recipe, the flags,
the user's own `accelerate config` or a second GPU ask for it.
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
    from .recipe import Recipe


# Sub-command -> script in `trl_ext/scripts`
TRAINERS = {"tdpo": "tdpo", "self-refine-dpo": "self_refine_dpo"}

CONTINUE = {
    "aries": ": what is done is kept; the same command continues.",
    **dict.fromkeys(
        TRAINERS, ": `--resume_from_checkpoint true` continues from the last checkpoint, if there is one."
    ),
}

EXAMPLES = """\
examples:
  trl-ext tdpo --config recipes/qwen2.5-7b/tdpo/config_qlora.yaml
  trl-ext tdpo --config recipes/qwen2.5-7b/tdpo/config_full.yaml --accelerate_config fsdp2 --learning_rate 1.0e-6
  trl-ext tdpo --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name pairs.jsonl --output_dir out
  trl-ext aries run --config recipes/my_rounds.yaml --training.learning_rate 1.0e-6
  trl-ext aries report runs/my_rounds
  trl-ext aries export --config recipes/my_rounds.yaml --output my-model --push_to_hub me/my-model
  trl-ext aries pairs --config recipes/my_rounds.yaml --output my-pairs
  trl-ext doctor --config recipes/my_rounds.yaml
  trl-ext migrate old_dpo_recipe.yaml --output recipes/new.yaml

`trl-ext tdpo --help` lists every key: TRL's, and those of the method."""


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
    aries = commands.add_parser("aries", help="rounds of generation, self-refinement and training", allow_abbrev=False)
    actions = aries.add_subparsers(dest="action", metavar="action", title="actions", required=True)
    meanings = {
        "run": "start the rounds, or continue them",
        "status": "say how far they are",
        "report": "write a run's report.html",
        "compare": "put two runs side by side",
        "answers": "write a round's evaluation answers for a judge",
        "lm-eval": "run lm-evaluation-harness on a round's model",
        "export": "save a round's policy as a model of its own",
        "pairs": "save the pairs of all rounds as a dataset",
        "try-verifier": "score ten rows with the recipe's verifiers",
    }
    options = {
        "run": "[--quiet] [--log_format FORMAT] ",
        "answers": "[--round N] [--turn K] [--format FORMAT] --output FILE ",
        "lm-eval": "[--round N] --tasks TASKS ",
        "export": "[--round N] [--merge | --adapter] --output DIR [--push_to_hub REPO [--private]] ",
        "pairs": "--output DIR [--push_to_hub REPO [--private]] ",
    }
    for name, meaning in meanings.items():
        action = actions.add_parser(name, help=meaning, description=f"{meaning}.", allow_abbrev=False)
        if name == "compare":
            action.add_argument("runs", type=Path, nargs=2, metavar="RUN_DIR", help="a run directory")
            continue
        action.add_argument("--config", required=name != "report", metavar="RECIPE", help="the recipe, a YAML file")
        if name == "report":
            action.add_argument(
                "run", type=Path, nargs="?", metavar="RUN_DIR", help="the run directory, or else a recipe"
            )
            action.usage = "trl-ext aries report (RUN_DIR | --config RECIPE [--section.key value ...])"
            continue
        passed = " [-- LM_EVAL_ARGS ...]" if name == "lm-eval" else ""
        action.usage = f"trl-ext aries {name} --config RECIPE {options.get(name, '')}[--section.key value ...]{passed}"
    init = actions.add_parser("init", help="write a task that runs as it stands, to be made yours", allow_abbrev=False)
    init.add_argument("directory", type=Path, metavar="DIR", help="the directory to make")
    init.add_argument("--model", help="path or id of the model; a small one on the Hub by default")
    init.add_argument("--text", action="store_true", help="prompts of plain text, for a model without a chat template")
    run = actions.choices["run"]
    run.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    run.add_argument("--log_format", choices=("text", "json"), default="text", help="json: one object per line")
    answers, lm_eval = actions.choices["answers"], actions.choices["lm-eval"]
    answers.add_argument("--round", type=int, metavar="N", help="the round; the last evaluated one by default")
    answers.add_argument("--turn", type=int, default=1, metavar="K", help="1, the direct answer, by default")
    answers.add_argument("--format", choices=("alpaca_eval", "jsonl"), default="alpaca_eval", help="of the file")
    answers.add_argument("--output", type=Path, required=True, metavar="FILE", help="the file to write")
    lm_eval.add_argument("--round", type=int, metavar="N", help="the round; the last trained one by default")
    lm_eval.add_argument("--tasks", required=True, help="tasks of lm-evaluation-harness, separated by commas")
    for name in ("export", "pairs"):
        action = actions.choices[name]
        action.add_argument("--output", type=Path, required=True, metavar="DIR", help="the directory to make")
        action.add_argument("--push_to_hub", metavar="REPO", help="upload it to this repository, `user/name`, too")
        action.add_argument("--private", action="store_true", help="where the repository is new, keep it private")
    export = actions.choices["export"]
    export.add_argument("--round", type=int, metavar="N", help="the round; the last finished one by default")
    form = export.add_mutually_exclusive_group()
    form.add_argument(
        "--merge",
        dest="form",
        action="store_const",
        const="merged",
        help="merge the adapter into the base, in the checkpoint's data type (default)",
    )
    form.add_argument("--adapter", dest="form", action="store_const", const="adapter", help="save the adapter alone")
    add_doctor_and_migrate(commands)
    completion = commands.add_parser(
        "completion",
        help="print what makes a shell complete commands, flags and keys",
        description="print a completion script, for example: trl-ext completion bash > ~/.trl-ext.bash",
        allow_abbrev=False,
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish", "tcsh"))
    return parser


def add_doctor_and_migrate(commands: "argparse._SubParsersAction") -> None:
    meaning = "look at the installation, the machine and, with --config, at a recipe; nothing is trained"
    doctor = commands.add_parser("doctor", help="check the installation, or a recipe", description=meaning)
    doctor.usage = "trl-ext doctor [--config RECIPE] [--start-vllm] [--probe] [--section.key value ...]"
    doctor.add_argument("--config", type=Path, metavar="RECIPE", help="a trainer's recipe, or one of ARIES")
    doctor.add_argument("--start-vllm", action="store_true", help="start vLLM on a tiny model, and generate")
    doctor.add_argument("--probe", action="store_true", help="run a little of the recipe, and estimate its time")
    migrate = commands.add_parser(
        "migrate",
        help="turn a DPO recipe of another project, or an older one, into a current one",
        description="turn a DPO recipe of alignment-handbook, axolotl, LLaMA-Factory, RLHFlow or older TRL into a current one, and list every "
        "change",
        allow_abbrev=False,
    )
    migrate.add_argument("old", type=Path, metavar="OLD_RECIPE", help="a YAML file")
    migrate.add_argument(
        "--method", choices=tuple(TRAINERS), default="tdpo", help="of the new recipe; tdpo by default"
    )
    migrate.add_argument("--output", type=Path, metavar="FILE", help="the file to write; stdout by default")


def split_passed_args(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """This command line, and what `aries lm-eval` passes on: all after a bare `--`."""
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
    if args.command == "completion":
        if unknown:
            parser.error(f"unknown arguments: {' '.join(unknown)}")
        from .completion import script

        print(script(parser, args.shell))  # noqa: T201
        return 0
    if args.command == "doctor":
        from . import doctor

        return doctor.main(args.config, unknown, args.start_vllm, args.probe)
    if args.command == "migrate":
        if unknown:
            parser.error(f"unknown arguments: {' '.join(unknown)}")
        from . import migrate

        return migrate.main(args.old, args.method, args.output)
    if args.action == "init":
        from .new_task import DEFAULT_MODEL, init

        return init(args.directory, args.model or DEFAULT_MODEL, args.text)
    if args.action == "compare" or (args.action == "report" and args.config is None):
        return look_at_runs(args, unknown)
    if args.action == "report":  # the parser takes the value of an override for the run directory
        from .recipe import take_flag

        unknown = take_flag(argv[2:], "config")[1]
    return aries(args, unknown, passed)


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, which end a process without a word otherwise, and leave what it started behind."""

    def __init__(self, number: signal.Signals):
        super().__init__()
        self.number = number


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Unwind on SIGTERM and SIGHUP as on Ctrl-C; where they are ignored, as under `nohup`, they stay so."""

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


def look_at_runs(args: argparse.Namespace, unknown: Sequence[str]) -> int:
    """`trl-ext aries report` and `compare` of run directories, which hold all they need."""
    from .recipe import RecipeError

    if unknown:
        raise RecipeError(
            f"command line: unexpected argument `{unknown[0]}`. Overrides belong to a recipe, `--config`."
        )
    if args.action == "compare":
        from .aries.results.compare import compare

        return compare(*args.runs)
    if args.run is None:
        raise RecipeError("`aries report` needs a run directory, or a recipe: `--config RECIPE`.")

    from .aries.results.report import report

    return report(args.run)


def aries(args: argparse.Namespace, overrides: Sequence[str], passed: Sequence[str]) -> int:
    """
    `trl-ext aries`: the recipe, what the command line adds to it, then the loop, its state, or something made of its
    results. A stage that fails leaves its log; the error names it, and the exit code is 1.
    """
    from .recipe import apply_overrides, export_env, load_yaml, parse_section

    recipe = export_env(apply_overrides(load_yaml(args.config), overrides))

    from .aries.children import ChildError
    from .aries.config import AriesConfig
    from .terminal import printable

    config = parse_section(recipe, AriesConfig)
    if args.action == "status":
        from .aries.results.status import status

        return status(config)
    if args.action == "report":
        from .aries.results.report import report

        return report(Path(config.output_dir))
    if args.action == "try-verifier":
        from .aries.scoring.try_verifier import try_verifier

        return try_verifier(config)
    if args.action == "answers":
        from .aries.results.answers import export_answers

        return export_answers(config, args.round, args.turn, args.format, args.output)
    if args.action == "lm-eval":
        from .aries.results.harness import lm_eval

        return lm_eval(config, args.round, args.tasks, passed)

    from .aries.rounds import run

    try:
        if args.action == "export":
            from .aries.results.export import export

            return export(config, args.round, args.output, args.form, args.push_to_hub, args.private)
        if args.action == "pairs":
            from .aries.results.pairs_dataset import export_pairs

            return export_pairs(config, args.output, args.push_to_hub, args.private)
        return run(config, recipe, log_format=args.log_format, quiet=args.quiet)
    except ChildError as error:
        print(printable(f"error: {error}"), file=sys.stderr)  # noqa: T201
        return 1


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

    # One clear error rather than one from each process. In a process that ends: arguments are made with CUDA, of which this one, which
    # waits until the training is over, must hold nothing
    code = run_launcher(f"{__package__}.scripts.check", [TRAINERS[command], *script_args])
    if code != 0:
        return code
    return run_launcher("accelerate.commands.launch", ["--quiet", *launch_args, "--module", script, *script_args])


def split_launch_args(recipe: "Recipe", args: Sequence[str]) -> tuple[list[str] | None, list[str]]:
    """
    What goes to `accelerate launch`, `None` if it is not needed, and what goes to the script. The command line's value goes
    before the recipe's.
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
    """Whether a plain `accelerate launch` would do something else than run one process on one device."""
    from accelerate.commands.config.config_args import default_config_file

    if os.path.isfile(default_config_file):
        return True

    import torch

    return torch.cuda.device_count() > 1 and not recipe.mapping.get("use_cpu")


if __name__ == "__main__":
    sys.exit(main())
