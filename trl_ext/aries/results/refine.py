"""
Refinement by itself: a model answers prompts and refines its answers, as policies do in the loop, and one answer of each chain is chosen.

In: prompts, and a model or a run whose policy answers. Out: a new file, or rows. Beside the file, `OUTPUT.work/` holds what a killed command
continues from; it is removed once the file is complete. Nothing is trained. The work itself is done in `stages/refine.py`.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

from pydantic import TypeAdapter

from ...model_files import folder_problem
from ...outputs import check_new
from ...recipe import Recipe, RecipeError, apply_overrides, export_env, load_yaml, parse_section
from ..children import one_gpu, run_child
from ..config import RefineConfig, ScoresConfig
from ..data.disk import writing
from ..data.pairs import similarity
from ..data.prompts import Prompts, checked_prompts, load_prompts
from ..data.records import Chain, Prompt, read_json, read_jsonl, read_rows, to_line, write_json, write_jsonl
from ..policies import policy_after
from ..provenance import check_policy
from ..run_dir import FIRST_FILES, OPERATIONAL_KEYS, RunDir, acquire, differing_keys, lookup, with_defaults
from ..scoring.scores import read_chains
from ..scoring.watch import ends_explained
from .answers import alpaca_eval_rows, message_rows
from .progress import RunProgress
from .state import chosen_round


FORMATS = ("jsonl", "messages", "alpaca_eval")
# What `--select` may begin with -> whether a name may follow
SELECTIONS = {"last": False, "all": False, "rule": False, "scores": False, "judge": False} | {
    "verifier": True,
    "reward_model": True,
}
ADAPTER_CONFIG = "adapter_config.json"


@dataclass
class RefineMessage:
    """What a process of `stages/refine.py` does: `"probe"`, `"answers"`, `"check"`, `"scores"`, or the reward model of a name."""

    work: Path
    step: str
    name: str | None = None


class WorkDir(RunDir):
    """
    What is between the prompts and the output. The only change w.r.t. [`RunDir`] is that there are no rounds: it has one file of answers.

    Args:
        path (`Path`):
            The directory.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        self.prompts = path / "prompts.jsonl"
        self.answers = path / "answers.jsonl"
        self.scores = path / "scores.jsonl"
        self.probe = path / "parity_probe.json"

    def read_config(self) -> RefineConfig:
        return TypeAdapter(RefineConfig).validate_python(read_json(self.resolved))

    @contextmanager
    def begun(self, config: RefineConfig, prompts: Prompts) -> Iterator[None]:
        """
        Make the directory, or continue it, with its lock held.

        Raises:
            [`RecipeError`]: it was begun with other settings or prompts, holds other files, another process is using it, or it cannot be
                made.
        """
        if not self.resolved.exists() and self.path.is_dir() and {p.name for p in self.path.iterdir()} - FIRST_FILES:
            check_new(self.path)
        try:
            self.path.mkdir(exist_ok=True)
        except OSError as error:
            raise RecipeError(f"`--output`: cannot write {self.path}: {error.strerror}.") from error
        with writing(self.path), open(self.lock, "w") as lock:
            self._claim(lock, json.loads(json.dumps(asdict(config))), prompts)
            yield

    def _claim(self, lock: IO, settings: dict[str, Any], prompts: Prompts) -> None:
        if not acquire(lock):
            raise RecipeError(f"{self.path} is in use by another process. Wait for it, or name another `--output`.")
        begun = read_json(self.resolved)
        if begun is not None:
            changed = differing_keys(with_defaults(begun, RefineConfig), settings) - OPERATIONAL_KEYS - {"select"}
            found = [key for key in sorted(changed) if not key.startswith("scores")]  # what was generated stays
            details = [f"{key}: {lookup(begun, key)!r} -> {lookup(settings, key)!r}" for key in found]
            if self.prompts.exists() and not self._has(prompts):
                details.append("the prompts")
            if details:
                lines = "\n".join(f"  {line}" for line in details)
                raise RecipeError(
                    f"{self.path} was begun with other settings or prompts:\n{lines}\nGo back to the old ones to continue, name another "
                    "`--output`, or remove the directory."
                )
        write_json(self.resolved, settings)  # first: a directory that has it is ours
        if not self.prompts.exists():
            write_jsonl(self.prompts, prompts)

    def _has(self, prompts: Prompts) -> bool:
        with open(self.prompts, encoding="utf-8") as file:
            return all(line == known for line, known in zip_longest(map(to_line, prompts), file))


class RefineProgress(RunProgress):
    """The only change w.r.t. [`RunProgress`] is that there are no rounds."""

    def __init__(self, quiet: bool = False):
        super().__init__(rounds=0, quiet=quiet)

    def label(self, number: int, name: str) -> str:
        return name


# What is asked


def run_settings(path: Path, number: int | None, scored: bool) -> dict[str, Any]:
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
    number = chosen_round(run, number, finished, "finished")
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
        "pairs": {"settled_similarity": config.pairs.settled_similarity},
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
    run: Path | None, number: int | None, select: Sequence[str], given: dict[str, Any], overrides: Sequence[str] = ()
) -> RefineConfig:
    """
    Args:
        run (`Path`, *optional*), number (`int`, *optional*):
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
        base = (read_json(Path(adapter) / ADAPTER_CONFIG) or {}).get("base_model_name_or_path")
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
    if not work.answers.exists():
        if scorers:
            start("check", "check")
        if config.generation.base_urls is not None and not work.probe.exists():
            start("probe", "probe", env=one_gpu())
        start("answers", "drafts and refinements")
    for scorer in scorers:
        if scorer.reward_model is not None:
            start("reward_model", scorer.name, scorer.name)
    if scorers:
        start("scores", "scores")


def choose(chain: Chain, scores: list[float | None], select: str, settled_similarity: float) -> int | None:
    """
    Index of the chosen answer. One that was cut off by `max_tokens`, or is empty, is chosen only if all are; among equal scores the latest
    is. Without a settled answer the rule takes the last one. `None` if there is no answer, or with `select="all"`.

    Example:

    ```python
    >>> chain = Chain("p-1", "x", [Answer(1, "1 2", 2, "stop"), Answer(2, "1 2", 2, "stop"), Answer(3, "2 1", 2, "stop")])
    >>> [choose(chain, [0.5, 1.0, 0.0], select, 0.9) for select in ("last", "scores", "rule")]
    [2, 1, 1]
    ```
    """
    answers = chain.answers
    if not answers or select == "all":
        return None
    whole = [i for i, answer in enumerate(answers) if answer.finish_reason == "stop" and answer.text.strip()]
    whole = whole or list(range(len(answers)))
    if select == "scores":
        return max(whole, key=lambda i: (scores[i] is not None, scores[i] or 0.0, i))
    if select == "rule":
        settled = [i for i in whole if i and similarity(answers[i - 1].text, answers[i].text) >= settled_similarity]
        return (settled or whole)[-1]
    return whole[-1]


Choice = tuple[dict[str, Any], Chain, list[float | None], int | None]


def choices(work: WorkDir, config: RefineConfig) -> Iterator[Choice]:
    """Of each prompt: its row, its chain, the scores of the answers, and the index of the chosen one."""
    scored = read_rows(work.scores) if config.scores.each() else None
    for prompt, chain in read_chains(work.prompts, work.answers):
        scores = [None] * len(chain.answers) if scored is None else next(scored)["scores"]
        yield prompt, chain, scores, choose(chain, scores, config.select, config.pairs.settled_similarity)


def full_row(choice: Choice) -> dict[str, Any]:
    """A prompt with the chosen answer, its turn and its score, and all answers, each with its score."""
    _, chain, scores, index = choice
    chosen: tuple[str | None, int | None, float | None] = (None, None, None)
    if index is not None:
        chosen = (chain.answers[index].text, chain.answers[index].turn, scores[index])
    made = chain.to_row()
    made["answers"] = [answer | {"score": score} for answer, score in zip(made["answers"], scores, strict=True)]
    return {
        "prompt_id": made.pop("prompt_id"),
        "prompt": chain.prompt,
        **dict(zip(("answer", "turn", "score"), chosen, strict=True)),
        **made,
    }


def formatted(made: Iterator[Choice], file_format: str, name: str, select: str) -> Iterator[dict[str, Any]]:
    """Rows of a file in one of [`FORMATS`]; with `select="all"`, the last two have a row for each answer."""
    for choice in made:
        prompt, chain, _, index = choice
        if file_format == "jsonl":
            yield full_row(choice)
            continue
        for i in range(len(chain.answers)) if select == "all" else [] if index is None else [index]:
            one = Chain(chain.prompt_id, chain.prompt, [chain.answers[i]])
            generator = f"{name}-y{i + 1}" if select == "all" else f"{name}-{select}"
            if file_format == "messages":
                yield from message_rows([one], 1, generator)
            else:
                yield from alpaca_eval_rows([one], [prompt], 1, generator)


def policy_name(config: RefineConfig, run: Path | None) -> str:
    return (run or Path(config.adapter or config.model.model_name_or_path)).name


def write_output(work: WorkDir, config: RefineConfig, output: Path, file_format: str, name: str) -> None:
    rows = formatted(choices(work, config), file_format, name, config.select)
    with writing(output):
        if file_format == "alpaca_eval":
            write_json(output, list(rows))
        else:
            write_jsonl(output, rows)


def summary(work: WorkDir, config: RefineConfig) -> str:
    """How many of the answers of each turn were chosen, their mean scores, and how many prompts have none."""
    chosen: dict[int, int] = {}
    means: dict[int, list[float]] = {}
    empty = 0
    for _, chain, scores, index in choices(work, config):
        empty += not chain.answers
        if index is not None:
            chosen[index + 1] = chosen.get(index + 1, 0) + 1
        for turn, score in enumerate(scores, start=1):
            if score is not None:
                means.setdefault(turn, []).append(score)
    parts = ["chosen: " + ", ".join(f"y{turn} {chosen[turn]:,}" for turn in sorted(chosen))] if chosen else []
    if means:
        parts.append("mean scores: " + ", ".join(f"y{t} {sum(s) / len(s):.3g}" for t, s in sorted(means.items())))
    parts += [f"{empty:,} prompts have no answer"] if empty else []
    return "; ".join(parts)


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
    if not work.resolved.exists():  # else the file is this directory's, which a kill has left
        for path in (output, output.with_name(output.name + ".tmp")):  # what it is called while it is written
            check_new(path)
    with work.begun(config, prompts):
        work_on(work, config, progress)
        write_output(work, config, output, file_format, name)
        text = summary(work, config)
    shutil.rmtree(work.path)
    return text


def refine_command(
    run: Path | None,
    number: int | None,
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
    round: int | None = None,
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
            A path, or an id on the Hub. Default: the base that `adapter` names.
        adapter (`str`, *optional*):
            A LoRA adapter on it.
        run (`str`, *optional*), round (`int`, *optional*):
            The directory of an ARIES run, instead of a model: its policy answers, with the run's templates, sampling and answer pattern.
            Default: the last finished round.
        turns (`int`, *optional*, defaults to `4`):
            Answers of a chain, the first one included.
        select (`str` or `list[str]`, *optional*, defaults to `"last"`):
            The answer to choose: `"last"`, `"rule"` (the last one that is like the one before it), `["verifier", "file.py:name"]`,
            `["reward_model", "name"]`, `"judge"` or `"scores"` (the best by `scores`), or `"all"` for no choice.
        generation (`dict`, *optional*), drafts (`dict`, *optional*), refinements (`dict`, *optional*), scores (`dict`, *optional*):
            Sections of an ARIES recipe: the engine, sampling, strategy and templates, and who scores.
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
        "refinements": {**(refinements or {}), "turns": turns},
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
