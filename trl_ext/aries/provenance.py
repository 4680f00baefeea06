"""
Provenance: make sure that a run continues with the files it made.

The SHA-256 of a file is noted in its round's `made.json` when the stage that made it ends, and moves to the manifest later. A run that
continues compares before it does anything else. Unfinished files and a trainer's checkpoints are not compared.
"""

from collections.abc import Collection, Iterator
from pathlib import Path

from ..recipe import RecipeError
from .config import AriesConfig
from .data.records import read_json, sha256, write_json
from .policies import base_round, policy_after
from .run_dir import RunDir


# Files of a closed round that later rounds read besides its policy
READ_LATER = ("evaluation_prompts.jsonl", "evaluation.jsonl", "evaluation_scores.jsonl", "selecting_scores.jsonl")


def made_files(run: RunDir, number: int) -> list[Path]:
    """What a round may have made, in the order in which it is made."""
    round_dir = run.round(number)
    return [
        *([run.evaluation_prompts] if number == 0 else []),
        *(
            round_dir.sft,
            round_dir.prompts,
            round_dir.answers,
            round_dir.scores,
            round_dir.guard_scores,
            round_dir.pairs,
        ),
        *(round_dir.model, round_dir.adapter, round_dir.samples),
        *(round_dir.evaluation, round_dir.evaluation_scores, round_dir.selecting_scores, round_dir.metrics),
    ]


def made(run: RunDir, number: int) -> dict[str, str]:
    """SHA-256 of what a round has made, by name: as noted, or as it is now if there is no note yet."""
    noted = read_json(run.round(number).made) or {}
    there = [path for path in made_files(run, number) if _found(run, number, path) is not None]
    return {path.name: noted.get(path.name) or sha256(_found(run, number, path)) for path in there}


def note_made(run: RunDir, rounds: int) -> None:
    """Note what the rounds without a manifest have made."""
    for number in range(rounds + 1):
        round_dir = run.round(number)
        if round_dir.path.exists() and not round_dir.manifest.exists():
            now = made(run, number)
            now.pop(round_dir.metrics.name, None)  # rewritten until the manifest is there
            if now != (read_json(round_dir.made) or {}):
                write_json(round_dir.made, now)


def forget(run: RunDir, number: int, names: Collection[str]) -> None:
    """Take back the notes of files that will be made again."""
    noted = read_json(run.round(number).made) or {}
    write_json(run.round(number).made, {name: value for name, value in noted.items() if name not in names})


def check_made(run: RunDir, config: AriesConfig) -> None:
    """
    Compare what an unfinished run has made with the notes; of the policies, only those still needed.

    Raises:
        [`RecipeError`]: a file has changed, or is gone and cannot be made again.
    """
    is_open = next(n for n in range(config.rounds + 2) if not run.round(n).manifest.exists())
    base = base_round(run, is_open)
    needed = {_path(run, config, n) for n in (0, max(base, 0), max(is_open - 1, 0), is_open)}
    for number in range(config.rounds + 1):
        closed, files = read_json(run.round(number).manifest), {path.name: path for path in made_files(run, number)}
        expected = closed["sha256"] if closed else read_json(run.round(number).made) or {}
        for name in files.keys() & expected.keys():
            if name not in ("model", "adapter") or str(files[name]) in needed:
                read = str(files[name]) in needed or (name in READ_LATER and number in (0, base, is_open - 1))
                _compare(
                    run, number, files[name], expected[name], closed=bool(closed), is_needed=bool(closed) and read
                )
        if closed and closed.get("parent") is not None:
            _compare(run, number - 1, run.round(number - 1).manifest, closed["parent"]["manifest_sha256"])


def check_policy(run: RunDir, config: AriesConfig, number: int) -> None:
    """
    Check the policy after a round before it is used outside the run.

    Raises:
        [`RecipeError`]: it is not what the run made.
    """
    path = _path(run, config, number)
    for n in range(number, -1, -1):  # an untrained round has an earlier one's
        for file in (run.round(n).model, run.round(n).adapter):
            if str(file) == path:
                check_file(run, n, file)


def check_file(run: RunDir, number: int, path: Path) -> None:
    """
    Check a file of a round before it is used outside the run.

    Raises:
        [`RecipeError`]: it is not what the run made.
    """
    noted = (read_json(run.round(number).manifest) or {}).get("sha256") or read_json(run.round(number).made) or {}
    if path.name in noted:
        _compare(run, number, path, noted[path.name])


def _path(run: RunDir, config: AriesConfig, number: int) -> str:
    policy = policy_after(run, config, number)
    return policy.adapter or policy.model


def _found(run: RunDir, number: int, path: Path) -> Path | None:
    """Where a file is: a policy may have been set aside."""
    return next(filter(Path.exists, _places(run, number, path)), None)


def _places(run: RunDir, number: int, path: Path) -> Iterator[Path]:
    yield path
    yield run.round(number).set_aside / path.name


def _compare(run: RunDir, number: int, path: Path, expected: str, closed: bool = True, is_needed: bool = True) -> None:
    found = _found(run, number, path)
    if found is None:
        if not is_needed:  # it is made again, or no longer read
            return
        raise RecipeError(
            f"{path} is missing, but the run needs it to continue. Restore it, or set another `output_dir`."
        )
    actual = sha256(found)
    if actual != expected:
        again = "" if closed else f", or delete {found} to have it made again"
        raise RecipeError(
            f"{found} is not what the run made in round {number} (SHA-256 {actual[:12]}…, expected {expected[:12]}…), and the run would "
            f"continue with it. Restore the original{again}, or set another `output_dir`."
        )
