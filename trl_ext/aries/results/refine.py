"""
Refinement by itself: a model answers prompts and refines its answers, as policies do in the loop, and one answer of each chain is chosen.

In: prompts, and a model or a run whose policy answers. Out: a new file, or rows. Beside the file, `OUTPUT.work/` holds what a killed command
continues from; it is removed once the file is complete. Nothing is trained. The work itself is done in `stages/refine.py`.
"""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

from ...model_files import folder_problem
from ...outputs import check_new
from ...recipe import Recipe, RecipeError, apply_overrides, export_env, load_yaml, parse_section
from ..children import one_gpu, run_child
from ..config import RefineConfig, ScoresConfig, SettledConfig
from ..data.prompts import Prompts, checked_prompts, load_prompts
from ..data.records import Prompt, read_json, read_jsonl
from ..policies import policy_after
from ..provenance import check_policy
from ..run_dir import RunDir
from ..scoring.watch import ends_explained
from .chosen import summary, write_output
from .progress import RunProgress
from .state import chosen_round
from .work_dir import RefineMessage, WorkDir


# What `--select` may begin with -> whether a name may follow
SELECTIONS = {
    "last": False,
    "rule": False,
    "verifier": True,
    "reward_model": True,
    "judge": False,
    "scores": False,
    "all": False,
}
ADAPTER_CONFIG = "adapter_config.json"


class RefineProgress(RunProgress):
    """The only change w.r.t. [`RunProgress`] is that there are no rounds."""

    def __init__(self, quiet: bool = False):
        super().__init__(rounds=0, quiet=quiet)

    def label(self, number: int, name: str) -> str:
        return name


# What is asked


def run_settings(path: Path, number: int | str | None, scored: bool) -> dict[str, Any]:
    """
    The settings of a run's policy: the model, how it is sampled, its templates and its answer pattern, and with `scored` its scorers.

    Raises:
        [`RecipeError`]: it is no run, the round is not finished, or its policy is not what the run made.
    """
    run = RunDir(path)
    if not run.resolved.exists():
        raise RecipeError(f"{path} is not the directory of a run. To refine with a model, write `--model {path}`.")
    export_env(load_yaml(run.recipe))
    config = run.read_config()
    config.output_dir = str(path)  # it may have been moved
    finished = [n for n in range(config.rounds + 1) if run.round(n).manifest.exists()]
    number = chosen_round(run, config, number, finished, "finished")
    check_policy(run, config, number)
    policy, base = policy_after(run, config, number), config.model["model_name_or_path"]
    sections = asdict(config)
    return {
        "model": {
            "model_name_or_path": policy.model,
            "model_revision": config.model.get("model_revision") if policy.model == base else None,
            "trust_remote_code": config.trust_remote_code,
        },
        "adapter": policy.adapter,
        **{name: sections[name] for name in ("generation", "drafts", "refinements", "seed")},
        "pairs": {key.name: sections["pairs"][key.name] for key in fields(SettledConfig)},
        **({"scores": sections["scores"]} if scored else {}),
    }


def merged(settings: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Settings with others on top: sections key by key, what is `None` left out."""
    found = dict(settings)
    for key, value in given.items():
        if isinstance(value, dict):
            found[key] = merged(found.get(key) or {}, value)
        elif value is not None:
            found[key] = value
    return found


def resolve(
    run: Path | None,
    number: int | str | None,
    select: Sequence[str],
    given: dict[str, Any],
    overrides: Sequence[str] = (),
) -> RefineConfig:
    """
    Args:
        run (`Path`, *optional*), number (`int` or `"best"`, *optional*):
            The directory of a run that stands for the model, and one of its rounds.
        select (`Sequence[str]`):
            One of [`SELECTIONS`], and a name if it may have one.
        given (`dict`), overrides (`Sequence[str]`):
            Settings, and those of the command line, which come last.

    Raises:
        [`RecipeError`]: a setting is wrong, or there is no model.
    """
    kind, *names = select
    if kind not in SELECTIONS or len(names) > SELECTIONS[kind]:
        known = ", ".join(f"{name} NAME" if named else name for name, named in SELECTIONS.items())
        raise RecipeError(f"`--select {' '.join(select)}`: choose one of {known}.")
    by_scores = kind not in ("last", "all", "rule")
    if run is not None and (given.get("model") or given.get("adapter")):
        raise RecipeError("A run stands for its model and adapter: leave out `--model` and `--adapter`, or the run.")
    settings = {} if run is None else run_settings(run, number, by_scores and not names)
    if number is not None and run is None:
        raise RecipeError("`--round` is a round of a run, and none is named.")
    settings = merged(settings, {**given, "select": "scores" if by_scores else kind})
    if names:
        settings = merged(settings, {"scores": {kind: names[0]}})
    settings = apply_overrides(Recipe(None, settings, {}), overrides).mapping
    adapter = settings.get("adapter")
    if adapter is not None and not settings.get("model"):
        base = (read_json(Path(adapter).expanduser() / ADAPTER_CONFIG) or {}).get("base_model_name_or_path")
        settings["model"] = {"model_name_or_path": base} if base else None
    if not settings.get("model"):
        raise RecipeError("`--model` is missing: a path or an id on the Hub. Or name the directory of a run first.")
    config = parse_section(Recipe(None, settings, {}), RefineConfig)
    check_there(config)
    check_kind(kind, config.scores)
    return config


def check_kind(kind: str, scores: ScoresConfig) -> None:
    kinds = sorted({each for scorer in scores.each() for each in scorer.kinds()})
    if kind in ("verifier", "reward_model", "judge") and kinds != [kind]:
        named = " and ".join(f"a `{each}`" for each in kinds)
        raise RecipeError(f"`--select {kind}`: `scores` names {named}. Write `--select scores`.")


def check_there(config: RefineConfig) -> None:
    """Look for the model's and the adapter's folders; ids on the Hub are looked up where they are loaded."""
    name, adapter = config.model.model_name_or_path, config.adapter
    problem = folder_problem(name)
    if problem is None and (Path(name) / ADAPTER_CONFIG).is_file() and not (Path(name) / "config.json").is_file():
        problem = f"{name} is an adapter. Write `--adapter {name}`, and `--model` for its base."
    if problem is not None:
        raise RecipeError(f"`model.model_name_or_path`: {problem}")
    problem = None if adapter is None else folder_problem(adapter)
    if problem is None and adapter is not None and Path(adapter).is_dir():
        if not (Path(adapter) / ADAPTER_CONFIG).is_file():
            problem = f"{adapter} has no {ADAPTER_CONFIG}, so it is not a LoRA adapter."
    if problem is not None:
        raise RecipeError(f"`adapter`: {problem}")


# What is done


def work_on(work: WorkDir, config: RefineConfig, progress: RefineProgress) -> None:
    """Answer the prompts, and score the answers if the settings name scorers. What is there already is not made again."""

    def start(step: str, shown: str, name: str | None = None, env: dict[str, str] | None = None) -> None:
        log = work.logs / f"{name or step}.log"
        with progress.stage(0, shown) as update, ends_explained(work, log, made=[]):
            message = RefineMessage(work.path.absolute(), step, name)
            run_child("trl_ext.aries.stages.refine", message, log, update, env=env, on_note=progress.say)

    scorers = config.scores.each()
    if scorers:  # also if the answers are there: others may have been named since
        start("check", "check")
    if not work.answers.exists():
        if config.generation.base_urls is not None and not work.probe.exists():
            start("probe", "probe", env=one_gpu())
        start("answers", "drafts and refinements")
    for scorer in scorers:
        if scorer.reward_model is not None:
            start("reward_model", scorer.name, scorer.name)
    if scorers:
        start("scores", "scores")


def policy_name(config: RefineConfig, run: Path | None) -> str:
    return (run or Path(config.adapter or config.model.model_name_or_path)).name


def refine_file(
    config: RefineConfig, prompts: Prompts, output: Path, file_format: str, name: str, progress: RefineProgress
) -> str:
    """
    Refine into a new file, or continue what an earlier process left in `OUTPUT.work/`, and return a [`summary`].

    Raises:
        [`RecipeError`]: the file is there already, or `OUTPUT.work/` was begun with other settings.
        [`~aries.children.ChildError`]: a process failed. The same call continues.
    """
    work = WorkDir(output.with_name(output.name + ".work"))
    if not work.complete.exists():  # else a kill has left both
        for path in (output, output.with_name(output.name + ".tmp")):  # what it is called while it is written
            check_new(path)
    with work.begun(config, prompts):
        work_on(work, config, progress)
        work.complete.touch()
        write_output(work, config, output, file_format, name)
        text = summary(work, config)
    shutil.rmtree(work.path)
    return text


def refine_command(
    run: Path | None,
    number: int | str | None,
    select: Sequence[str],
    given: dict[str, Any],
    overrides: Sequence[str],
    output: Path,
    file_format: str,
    quiet: bool,
) -> int:
    """`trl-ext aries refine`: see [`resolve`] and [`refine_file`]. Returns the exit code, 0."""
    config = resolve(run, number, select, given, overrides)
    if config.prompts is None:
        raise RecipeError("`--prompts` is missing: a file with a column `prompt`, or a dataset on the Hub.")
    prompts = load_prompts(config.prompts.entries(), "prompts.dataset")
    progress = RefineProgress(quiet)
    text = refine_file(config, prompts, output, file_format, policy_name(config, run), progress)
    progress.say(f"{output}: {text}")
    return 0


def refine(
    prompts: str | Path | Sequence[Prompt | dict[str, Any]],
    model: str | None = None,
    *,
    adapter: str | Path | None = None,
    run: str | Path | None = None,
    round: int | Literal["best"] | None = None,
    turns: int | None = None,
    select: str | Sequence[str] = "last",
    generation: dict[str, Any] | None = None,
    drafts: dict[str, Any] | None = None,
    refinements: dict[str, Any] | None = None,
    scores: dict[str, Any] | None = None,
    seed: int | None = None,
    output: str | Path | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """
    Have a model answer prompts and refine its answers, turn by turn, and choose one answer for each prompt
    (https://huggingface.co/papers/2502.05605). vLLM runs in processes of its own, which give their memory back.

    Args:
        prompts (`list` or `str`):
            Prompts, each a text, a list of messages that ends with the user's, or a `dict` with `prompt` and the columns that a verifier
            asks for; or a file of such rows. A text is continued as it is. Give messages to a chat model.
        model (`str`, *optional*):
            A path, or an id on the Hub. Default: the base that a local `adapter` names.
        adapter (`str`, *optional*):
            A LoRA adapter on it.
        run (`str`, *optional*):
            The directory of an ARIES run, instead of a model: its policy answers, with the run's templates, sampling and answer pattern.
        round (`int` or `"best"`, *optional*):
            A round of the run, or the one with the highest mean score. Default: the last finished one.
        turns (`int`, *optional*):
            Answers of a chain, the first one included. Default: 4, or the run's.
        select (`str` or `list[str]`, *optional*, defaults to `"last"`):
            The answer to choose: `"last"`, `"rule"` (the last one that agrees with the one before it), `["verifier", "file.py:name"]`,
            `["reward_model", "name"]`, `"judge"` or `"scores"` (the best by `scores`), or `"all"` for no choice.
        generation (`dict`, *optional*):
            The engine: keys of a recipe's section `generation`.
        drafts (`dict`, *optional*):
            Sampling: keys of a recipe's section `drafts`.
        refinements (`dict`, *optional*):
            Strategy, templates, and sampling of the later answers: keys of a recipe's section `refinements`.
        scores (`dict`, *optional*):
            Who scores: keys of a recipe's section `scores`.
        seed (`int`, *optional*, defaults to `42`):
            Seed of all sampling.
        output (`str`, *optional*):
            A new file for the rows, as JSON lines. With it, a call that was killed continues where it was.
        quiet (`bool`, *optional*, defaults to `False`):
            Whether to show no progress.

    Returns:
        `list[dict]`: for each prompt `prompt_id`, `prompt`, the chosen `answer`, its `turn` and its `score`, `answers` (all of them, each with
        `turn`, `text`, `tokens`, `finish_reason` and `score`), and `stopped`, why there are fewer answers than turns. `answer` is `None`
        if there is none, and with `select="all"`.

    Raises:
        [`RecipeError`]: an argument, the prompts or the model are at fault.
        [`ChildError`]: a process failed; the message has the end of its log.

    Example:

    ```python
    >>> from trl_ext import refine

    >>> question = [{"role": "user", "content": "How many primes are below 30?"}]
    >>> [row] = refine([question], model="Qwen/Qwen2.5-0.5B-Instruct", turns=3)
    >>> row["answer"]
    ```
    """
    given = {
        "model": None if model is None else {"model_name_or_path": str(model)},
        "adapter": None if adapter is None else str(adapter),
        "refinements": {**(refinements or {}), **({} if turns is None else {"turns": turns})},
        "seed": seed,
        **{
            name: value
            for name, value in (("generation", generation), ("drafts", drafts), ("scores", scores))
            if value
        },
    }
    from_file = isinstance(prompts, str | Path)
    if from_file:
        given["prompts"] = {"dataset": str(prompts)}
    directory = None if run is None else Path(run)
    config = resolve(directory, round, [select] if isinstance(select, str) else select, given)
    if from_file:
        rows = load_prompts(config.prompts.entries(), "prompts")
    else:
        listed = [row if isinstance(row, dict) else {"prompt": row} for row in prompts]
        if not listed:
            return []
        rows = checked_prompts([("prompts", listed, len(listed))], "prompts")
    with tempfile.TemporaryDirectory(prefix="trl-ext-refine-") as temporary:
        file = Path(temporary) / "refined.jsonl" if output is None else Path(output)
        progress = RefineProgress(quiet)
        progress.say(refine_file(config, rows, file, "jsonl", policy_name(config, directory), progress))
        return read_jsonl(file)
