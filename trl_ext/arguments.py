"""
The arguments of the `trl-ext` command. The flags of trainers, and overrides of an ARIES recipe, are not among them: the recipe's dataclasses
know those.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from . import __version__


# Sub-command -> script in `trl_ext/scripts`
TRAINERS = {"tdpo": "tdpo", "self-refine-dpo": "self_refine_dpo"}

EXAMPLES = """\
examples:
  trl-ext tdpo --config recipes/qwen2.5-7b/tdpo/config_qlora.yaml
  trl-ext tdpo --config recipes/qwen2.5-7b/tdpo/config_full.yaml --accelerate_config fsdp2 --learning_rate 1.0e-6
  trl-ext tdpo --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name pairs.jsonl --output_dir out
  trl-ext aries run recipes/my_rounds.yaml --training.learning_rate 1.0e-6
  trl-ext aries status runs/my_rounds
  trl-ext aries export runs/my_rounds --output my-model --push_to_hub me/my-model
  trl-ext aries compare runs/my_rounds runs/my_rounds-tdpo --output compared.html
  trl-ext aries refine --model Qwen/Qwen2.5-7B-Instruct --prompts questions.jsonl --turns 4 --output refined.jsonl
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
        "[--round N|best] [--turn K] [--format FORMAT] --output FILE ",
    ),
    "lm-eval": ("run lm-evaluation-harness on a round's model", "[--round N|best] --tasks TASKS "),
    "export": (
        "save a round's policy as a model or an adapter",
        "[--round N|best] [--merge | --adapter] --output DIR [--push_to_hub REPO [--private]] ",
    ),
    "pairs": ("save the pairs of all rounds as a dataset", "--output DIR [--push_to_hub REPO [--private]] "),
    "refine": (
        "refine answers to any prompts with a model, or with a run's policy",
        "[--round N|best] [--model MODEL] [--adapter ADAPTER] --prompts FILE [--turns N] [--select KIND [NAME]] [--format FORMAT] --output FILE ",
    ),
    "try-verifier": ("score ten rows with the recipe's verifiers", ""),
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
        run = "[RUN]" if name == "refine" else "RUN"
        action.usage = f"trl-ext aries {name} {run} {options}[--section.key value ...]{passed}"
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

    init = actions.add_parser(
        "init",
        help="write a task that runs as it stands",
        description="Write a task that runs as it stands, to be made yours: rows, a verifier, a recipe and a README.",
        allow_abbrev=False,
    )
    init.add_argument("directory", type=Path, metavar="DIR", help="the directory to make")
    init.add_argument("--model", help="path or id of the model; by default a small one on the Hub")
    init.add_argument("--text", action="store_true", help="prompts of plain text, for a model without a chat template")

    run, answers, lm_eval, export, pairs, refine = (
        actions.choices[name] for name in ("run", "answers", "lm-eval", "export", "pairs", "refine")
    )
    run.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    run.add_argument("--log_format", choices=("text", "json"), default="text", help="json: one object per line")
    for action, default in (
        (answers, "evaluated"),
        (lm_eval, "trained"),
        (export, "finished"),
        (refine, "finished"),
    ):
        better = ", or the best if that is clearly better" if action is export else ""
        action.add_argument(
            "--round",
            type=round_name,
            metavar="N",
            help=f"the round, or best for the one with the highest mean score; by default the last {default} one{better}",
        )
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
    add_refine(refine)
    form = export.add_mutually_exclusive_group()
    for flag, value, meaning in (
        ("--merge", "merged", "merge the adapter into the base, in the checkpoint's data type (default)"),
        ("--adapter", "adapter", "save the adapter alone"),
    ):
        form.add_argument(flag, dest="form", action="store_const", const=value, help=meaning)


def add_refine(parser: argparse.ArgumentParser) -> None:
    """The options of `trl-ext aries refine` that are no keys of a recipe, and short names of some that are."""
    parser.description = (
        "Have a model answer prompts and refine its answers, turn by turn, and choose one answer for each. RUN, the directory of a run, "
        "stands for the model: its policy, templates and sampling. Sections are a recipe's, as in --drafts.temperature 1.0."
    )
    parser.add_argument("--model", help="path or id of the model; by default the base that a local adapter names")
    parser.add_argument("--adapter", help="path or id of a LoRA adapter on it")
    parser.add_argument("--prompts", metavar="FILE", required=True, help="rows with `prompt`, or a dataset on the Hub")
    parser.add_argument("--turns", type=int, metavar="N", help="answers of a chain, the first included; by default 4")
    parser.add_argument(
        "--select",
        nargs="+",
        default=["last"],
        metavar=("KIND", "NAME"),
        help="the answer to choose: last (default), rule, verifier FILE:NAME, reward_model NAME, judge, scores, or all",
    )
    parser.add_argument(
        "--format",
        choices=("jsonl", "messages", "alpaca_eval"),
        default="jsonl",
        help="format of the file; by default jsonl, with every answer and its score",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors only")


def round_name(text: str) -> int | str:
    """`--round`: a number, or `best`."""
    if text != "best" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be the number of a round, or best; got {text!r}")
    return text if text == "best" else int(text)


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
