"""
The run directory: which file holds what, who may write to it, and what made it.

A stage is done when its file exists under its final name. `manifest.json` closes a round.
"""

import fcntl
import json
import re
import time
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import IO, Any

from pydantic import TypeAdapter

from ..outputs import check_apart
from ..recipe import RecipeError
from .config import AriesConfig
from .config.templates import TEMPLATES, was_default
from .data.disk import writing
from .data.records import append_lines, read_json, write_atomically, write_json


# Settings that may change while a run goes on: where it is, how the engine uses the machine, how results are described, and
# what stops it
OPERATIONAL_KEYS = {
    "output_dir",
    "evaluation.best_turn",
    "evaluation.bootstrap_samples",
    "evaluation.correct_score",
    "evaluation.scores.judge.max_concurrency",
    "evaluation.scores.judge.max_retries",
    "evaluation.scores.judge.timeout",
    "evaluation.scores.timeout",
    "generation.api_key_env",
    "generation.base_urls",
    "generation.cpu_kv_cache_gib",
    "generation.enforce_eager",
    "generation.engine",
    "generation.gpu_kv_cache_gib",
    "generation.gpu_memory_utilization",
    "generation.max_concurrency_per_server",
    "generation.max_num_seqs",
    "generation.max_outage",
    "generation.max_retries",
    "generation.ray_address",
    "generation.ray_workers",
    "generation.tensor_parallel_size",
    "generation.timeout",
    "health.max_dropped",
    "health.max_kl",
    "health.min_diversity",
    "health.min_length",
    "health.on_setback",
    "parity.tolerance",
    "pairs.guard",
    "scores.judge.max_concurrency",
    "scores.judge.max_retries",
    "scores.judge.timeout",
    "scores.timeout",
    "sft.report_to",
    "training.project",
    "training.report_to",
    "training.run_name",
    "training.trackio_space_id",
}


# What a process that was killed while it claimed a directory may leave there
FIRST_FILES = {"run.lock", "resolved.json.tmp"}

# How often and how long to wait for a process that only checks the lock
LOOKS, SECONDS_OF_A_LOOK = 20, 0.1


# Keys, in `resolved.json`, of who scores
SCORING = re.compile(r"(inputs\.)?(evaluation\.)?scores\b")


class ChangedSettings(RecipeError):
    """A run was begun with other settings or data."""


class RoundDir:
    """Files of one round, in the order they are made. Round 0 is the policy before round 1, after the SFT if any."""

    def __init__(self, path: Path):
        self.path = path
        self.sft = path / "sft.jsonl"
        self.sft_drops = path / "sft_drops.json"
        self.prompts = path / "prompts.jsonl"
        self.answers = path / "answers.jsonl"
        self.scores = path / "scores.jsonl"
        self.guard_scores = path / "guard_scores.jsonl"
        self.pairs = path / "pairs.jsonl"
        self.drops = path / "drops.json"
        self.guard = path / "guard.json"
        self.training = path / "training"
        self.model = path / "model"
        self.adapter = path / "adapter"
        self.samples = path / "parity.jsonl"
        self.parity = path / "parity.json"
        self.probe = path / "parity_probe.json"
        self.evaluation = path / "evaluation.jsonl"
        self.health = path / "health.json"
        self.set_aside = path / "set_aside"
        self.evaluation_scores = path / "evaluation_scores.jsonl"
        self.selecting_scores = path / "selecting_scores.jsonl"
        self.metrics = path / "metrics.json"
        self.setback = path / "setback.json"
        self.rolled_back = path / "rolled_back"
        self.cost = path / "cost.json"
        self.lm_eval = path / "lm_eval"
        self.made = path / "made.json"
        self.manifest = path / "manifest.json"
        self.logs = path / "logs"


class RunDir:
    """
    A run on disk.

    Args:
        path (`Path`):
            The recipe's `output_dir`.
    """

    def __init__(self, path: Path):
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.resolved = path / "resolved.json"
        self.events = path / "events.jsonl"
        self.evaluation_prompts = path / "evaluation_prompts.jsonl"
        self.overlap = path / "overlap.json"
        self.score_cache = path / "score_cache.jsonl"
        self.tracking = path / "tracking.json"
        self.progress = path / "progress.json"
        self.lock = path / "run.lock"
        self.report = path / "report.html"
        self.logs = path / "logs"
        self.verifier_call = self.logs / "verifier.call"

    def round(self, number: int) -> RoundDir:
        return RoundDir(self.path / f"round_{number:02d}")

    def read_config(self) -> AriesConfig:
        """What the recipe resolved to when the run was last started; keys that are missing there are at their defaults."""
        recorded = json.loads(self.resolved.read_text(encoding="utf-8"))
        return TypeAdapter(AriesConfig).validate_python({k: v for k, v in recorded.items() if k != "inputs"})

    @contextmanager
    def opened(self, config: AriesConfig, recipe_text: str, inputs: dict[str, str]) -> Iterator[None]:
        """
        Create the directory, or continue it, with the lock held.

        Args:
            config ([`AriesConfig`]), recipe_text (`str`):
                What the recipe resolved to, and the recipe.
            inputs (`dict[str, str | None]`):
                SHA-256 of what it names, by key, `None` for what is not on this machine: a run must not continue on other data.

        Raises:
            [`RecipeError`]: it belongs to another recipe or holds other files, another process is using it, or it cannot be written.
            [`~aries.data.disk.DiskError`]: the disk is full, now or later in the run.
        """
        self.check_free({})
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.lock, "w")
        except (OSError, ValueError) as error:  # a path with a NUL character is a ValueError
            reason = error.strerror if isinstance(error, OSError) else error
            raise RecipeError(f"`output_dir`: cannot write to {self.path}: {reason}. Choose another.") from error
        with lock:
            if not acquire(lock):
                raise RecipeError(
                    f"{self.path} is in use by another process. Wait for it, watch it with `trl-ext aries status`, or set "
                    "another `output_dir`."
                )
            with writing(self.path):
                self._claim(config, recipe_text, inputs)
                yield

    def check_free(self, inputs: Mapping[str, Path | None]) -> None:
        """
        Args:
            inputs (`Mapping[str, Path | None]`):
                What the recipe reads, from [`~aries.inputs.local_inputs`].

        Raises:
            [`RecipeError`]: the directory is not a run's yet and cannot become one: it holds files, it is, holds or lies inside an input, or
            it is the working directory.
        """
        if self.resolved.exists():
            return
        check_apart(self.path, {key: path for key, path in inputs.items() if path is not None})
        place = "Name a directory that is empty or does not exist yet, such as runs/my-run."
        try:
            found = sorted(path.name for path in self.path.iterdir() if path.name not in FIRST_FILES)
        except OSError:  # it does not exist yet, or cannot be used, which is reported later
            found = []
        if found:
            more = ", …" if len(found) > 3 else ""
            raise RecipeError(
                f"`output_dir`: {self.path} holds files that belong to no run ({', '.join(found[:3])}{more}). {place}"
            )
        if self.path.resolve() == Path.cwd():
            raise RecipeError(f"`output_dir`: {self.path} is the working directory. {place}")

    def _claim(self, config: AriesConfig, recipe_text: str, inputs: dict[str, str | None]) -> None:
        resolved = json.loads(json.dumps(asdict(config))) | {"inputs": inputs}
        if self.resolved.exists():
            recorded = self._recorded()
            if any(self.path.glob("round_*/*")):  # a run that was refused by its check has made nothing
                self._check_same(config, recorded, resolved)
            else:
                self.overlap.unlink(missing_ok=True)  # of the data of then
            if recorded == resolved and self.recipe.exists():
                return
            if self.may_score_again and any(map(SCORING.match, differing_keys(recorded, resolved))):
                for scores in self.path.glob("round_*/*scores.jsonl"):
                    scores.unlink()
        write_json(self.resolved, resolved)  # first, since this file marks the directory as a run's
        write_atomically(self.recipe, [recipe_text])

    def _check_same(self, config: AriesConfig, recorded: dict[str, Any], resolved: dict[str, Any]) -> None:
        settings, earlier = ({key: value for key, value in r.items() if key != "inputs"} for r in (resolved, recorded))
        changed = {key for key in differing_keys(earlier, settings) if not self._may_change(key)}
        # Rounds can be added if the finished ones do not depend on their number
        if config.rounds > recorded["rounds"] and config.prompts.per_round is not None:
            changed -= {"rounds"}
        details = [f"{key}: {lookup(earlier, key)!r} -> {lookup(settings, key)!r}" for key in sorted(changed)]
        # An input that an earlier version did not record is accepted
        for key in sorted(recorded["inputs"].keys() & resolved["inputs"].keys()):
            before, now = recorded["inputs"][key], resolved["inputs"][key]
            if before != now and key not in changed and not (self.may_score_again and SCORING.match(key)):
                details.append(f"{key}: {lookup(settings, key) or 'what it names'} {input_change(before, now)}")
        if details:
            lines = "\n".join(f"  {line}" for line in details)
            raise ChangedSettings(
                f"{self.path} was made with other settings or data:\n{lines}\nSet another `output_dir` for the new ones, or go back "
                f"to the old ones ({self.recipe}) to continue."
            )

    @property
    def may_score_again(self) -> bool:
        """Whether nothing has been made from scores yet, so that others may take their place."""
        return not (self.round(0).manifest.exists() or self.round(1).pairs.exists())

    def _may_change(self, key: str) -> bool:
        one_of_several = re.sub(r"\.scorers\[\d+\]", "", key)
        return one_of_several in OPERATIONAL_KEYS or (self.may_score_again and SCORING.match(key) is not None)

    def _recorded(self) -> dict[str, Any]:
        """What the run was made with; keys that its version of this package did not have are at their defaults."""
        try:
            recorded = json.loads(self.resolved.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise RecipeError(
                f"{self.resolved}: not valid JSON ({error}), so the run's settings are unknown. Restore the file, or "
                "set another `output_dir`."
            ) from error
        if not (isinstance(recorded, dict) and {"output_dir", "rounds", "inputs"} <= recorded.keys()):
            raise RecipeError(f"{self.resolved} does not hold a run's settings. Set another `output_dir`.")
        return with_defaults(recorded, AriesConfig)

    def log_event(self, **event: Any) -> None:
        """Append to `events.jsonl`: what happened, when."""
        append_lines(self.events, [json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **event}) + "\n"])

    def read_events(self) -> list[dict[str, Any]]:
        """What `events.jsonl` holds; its last line may be half written."""
        if not self.events.exists():
            return []
        lines = self.events.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]


def keep_templates(config: AriesConfig) -> AriesConfig:
    """
    A run that was begun when its strategy's default template was another one keeps that: a recipe that names no template means the one of
    the beginning.
    """
    refinements = config.refinements
    try:
        recorded = lookup(read_json(RunDir(Path(config.output_dir)).resolved), "refinements")
    except (RecipeError, RecursionError):  # [`RunDir.opened`] says what is wrong
        return config
    begun = lookup(recorded, "template")
    if (
        lookup(recorded, "strategy") in (None, refinements.strategy)  # the key is newer than some runs
        and refinements.template == TEMPLATES[refinements.strategy]
        and isinstance(begun, str)
        and was_default(begun)
    ):
        refinements.template = begun
    return config


def differing_keys(old: Any, new: Any, prefix: str = "") -> set[str]:
    """Dotted keys at which two resolved recipes differ, such as `scores.scorers[0].weight`."""
    if old == new:
        return set()
    if isinstance(old, dict) and isinstance(new, dict):
        keys = old.keys() | new.keys()
        return set().union(*(differing_keys(old.get(k), new.get(k), f"{prefix}.{k}" if prefix else k) for k in keys))
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and isinstance(new[0], dict):
        items = enumerate(zip(old, new, strict=True))
        return set().union(*(differing_keys(*item, f"{prefix}[{index}]") for index, item in items))
    return {prefix}


def with_defaults(recorded: Any, cls: type) -> Any:
    """A recorded section of a recipe, with the keys of `cls` that it lacks at their defaults, in nested sections too."""
    if not isinstance(recorded, dict):
        return recorded
    hints, complete = typing.get_type_hints(cls), dict(recorded)
    for field in fields(cls):
        if field.name not in recorded:
            if field.default is not MISSING:
                complete[field.name] = field.default
            elif field.default_factory is not MISSING:
                complete[field.name] = json.loads(json.dumps(asdict(field.default_factory())))
            continue
        value = recorded[field.name]
        for member in typing.get_args(hints[field.name]) or (hints[field.name],):
            items = typing.get_args(member)
            if is_dataclass(member):
                complete[field.name] = with_defaults(value, member)
            elif isinstance(value, list) and items and is_dataclass(items[0]):
                complete[field.name] = [with_defaults(item, items[0]) for item in value]
    return complete


def lookup(mapping: Any, dotted: str) -> Any:
    for key in dotted.replace("[", ".[").split("."):
        if isinstance(mapping, list) and key[0] == "[":
            mapping = mapping[int(key[1:-1])]
        else:
            mapping = mapping.get(key) if isinstance(mapping, dict) else None
    return mapping


def input_change(before: str | None, now: str | None) -> str:
    """What has become of an input, in words, with shortened hashes."""
    if now is None:
        return "no longer exists"
    if before is None:
        return f"is a file or a directory here now (SHA-256 {now[:12]}…), and was not when the run started"
    return f"has changed since the run started (SHA-256 {before[:12]}… -> {now[:12]}…)"


def acquire(lock: IO) -> bool:
    """Take a run's lock. If [`is_locked`] holds it for an instant, try again."""
    for look in range(LOOKS):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if look + 1 < LOOKS:
                time.sleep(SECONDS_OF_A_LOOK)
    return False


def is_locked(path: Path) -> bool:
    """Whether a process is running in this run directory."""
    if not path.exists():
        return False
    with open(path) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
