"""
SIGKILL at seeded moments, in every stage, to the whole run or to a stage's process alone. The oracle is the run that nothing
disturbed: after the last kill, the same command ends with the same files, byte for byte, clocks apart.
"""

import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from tests.aries.test_signals import Run
from tests.aries.tiny_run import EVALUATION_PROMPTS, MAX_TOKENS, PROMPTS, SLOTS, TURNS, command, recipe, results, run

from trl_ext.aries.data.records import read_jsonl


SECONDS = 900  # until a moment must have come


@dataclass
class Moment:
    """When a run is killed."""

    name: str
    has_come: Callable[[Path, random.Random], Callable[[], bool]]
    stage: str | None = None  # kill this stage's process alone, not the run


def lines_in(file: str, most: int):
    """While answers are generated: once a random number of them is there."""

    def has_come(output: Path, rng: random.Random):
        wanted = rng.randrange(1, most)
        return lambda: (output / file).exists() and (output / file).read_bytes().count(b"\n") >= wanted

    return has_come


def is_there(pattern: str):
    """As soon as a file or directory is there: for a `.tmp`, while what it will be is written."""
    return lambda output, rng: lambda: any(output.glob(pattern))


def soon_after(pattern: str, seconds: float):
    """A random time after a file or directory is there."""

    def has_come(output: Path, rng: random.Random):
        deadline = None

        def check() -> bool:
            nonlocal deadline
            if deadline is None and any(output.glob(pattern)):
                deadline = time.monotonic() + rng.uniform(0, seconds)
            return deadline is not None and time.monotonic() >= deadline

        return check

    return has_come


def torn_checkpoint(pattern: str):
    """While a checkpoint is written: its directory is there, its last file is not."""

    def has_come(output: Path, rng: random.Random):
        return lambda: any(not (path / "trainer_state.json").exists() for path in output.glob(pattern))

    return has_come


# In the order of the run
SFT = [
    Moment("SFT, a checkpoint is written", torn_checkpoint("round_00/training/checkpoint-*")),
    Moment("SFT, a step", soon_after("round_00/training/checkpoint-4", 0.05), "trl_ext.aries.stages.train"),
    Moment("SFT, its adapter is written", is_there("round_00/adapter.tmp")),
]
ANSWERS, EVALUATIONS = PROMPTS * TURNS, EVALUATION_PROMPTS * TURNS


def moments_of_round(number: int) -> list[Moment]:
    this, before = f"round_{number:02d}", f"round_{number - 1:02d}"
    return [
        Moment("generation, evaluation prompts", lines_in(f"{before}/evaluation.jsonl.part", EVALUATIONS)),
        Moment("generation", lines_in(f"{this}/answers.jsonl.part", ANSWERS)),
        Moment(
            "generation, the engine alone",
            lines_in(f"{this}/answers.jsonl.part", ANSWERS),
            "trl_ext.aries.stages.generate",
        ),
        Moment("parity", soon_after(f"{this}/answers.jsonl", 8.0)),
        Moment("scores", soon_after(f"{before}/parity.json", 3.0)),
        Moment(
            "scores, their process alone", soon_after(f"{this}/logs/scores.log", 1.0), "trl_ext.aries.stages.score"
        ),
        Moment("a manifest is written", is_there(f"{before}/manifest.json.tmp")),
        Moment("pairs", soon_after(f"{before}/manifest.json", 0.05)),
        Moment(
            "training, before its first step", soon_after(f"{this}/pairs.jsonl", 8.0), "trl_ext.aries.stages.train"
        ),
        Moment("training, a checkpoint is written", torn_checkpoint(f"{this}/training/checkpoint-*")),
        Moment("training, a step", soon_after(f"{this}/training/checkpoint-2", 0.05)),
        Moment("training, the adapter is written", is_there(f"{this}/adapter.tmp")),
    ]


@dataclass
class KilledRun:
    """A run that is killed at one moment after another."""

    output: Path
    rng: random.Random
    kills: Counter = field(default_factory=Counter)  # by moment
    torn: int = 0  # kills that left something half written
    seen: dict[str, bytes] = field(default_factory=dict)  # the `.part` files, as they grow

    @property
    def file(self) -> Path:
        return self.output.with_suffix(".yaml")

    def kill_at(self, moment: Moment) -> bool:
        """Start the run and kill it at this moment. `False` if it ended before: the moment was over."""
        has_come = moment.has_come(self.output, self.rng)
        with open(self.output.with_suffix(".log"), "a") as log:
            started = Run(command(self.file), output=log)
        process = started.process
        deadline = time.monotonic() + SECONDS
        while not has_come():
            time.sleep(0.0002)
            assert time.monotonic() < deadline, f"{moment.name}: not within {SECONDS} s"
            if process.poll() is not None:
                assert process.returncode == 0, self.output.with_suffix(".log").read_text()
                return False
        if moment.stage is None:
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        else:
            while not (found := children(process.pid, moment.stage)) and process.poll() is None:
                time.sleep(0.0002)  # its log may be there before it is
            for pid in found:
                with suppress(ProcessLookupError):  # it has ended
                    os.kill(pid, signal.SIGKILL)
            if process.wait() == 0:  # the stage had ended just before
                return False
            assert process.returncode == 1
            log = self.output.with_suffix(".log").read_text()
            assert f"{moment.stage} was ended by SIGKILL" in log and "Traceback" not in log
        started.wait_until_none_is_left()  # nothing writes any more
        self.kills[moment.name] += 1
        self.torn += (
            bool(list(self.output.rglob("*.tmp")))
            or torn_checkpoint("round_*/training/checkpoint-*")(self.output, self.rng)()
        )
        self.check_parts()
        return True

    def check_parts(self) -> None:
        """No answer is generated twice: what is there stays, and each line is a chain with one more answer than before."""
        for file in self.output.rglob("*.part"):
            name, content = str(file.relative_to(self.output)), file.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            assert whole.startswith(self.seen.get(name, b""))
            self.seen[name] = whole
            file_of_lines = self.output.with_suffix(".lines")
            file_of_lines.write_bytes(whole)
            answers = [(row["prompt_id"], len(row["answers"])) for row in read_jsonl(file_of_lines)]
            assert len(set(answers)) == len(answers)

    def spent(self) -> float:
        """At most so many tokens were generated, as a share of those that were kept: a kill loses what was being answered."""
        kept = sum(
            answer["tokens"]
            for file in [*self.output.glob("round_*/answers.jsonl"), *self.output.glob("round_*/evaluation.jsonl")]
            for row in read_jsonl(file)
            for answer in row["answers"]
        )
        kills = sum(count for name, count in self.kills.items() if name.startswith("generation"))
        return (kept + kills * SLOTS * MAX_TOKENS) / kept


def children(pid: int, module: str) -> list[int]:
    """Processes that run a module, and that this one or a server of its has started (`fork_server.py` names what it forks)."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with suppress(OSError):  # it has ended
            fresh = module.encode() in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            if fresh or Path(f"/proc/{child}/comm").read_text().strip() == module.rpartition(".")[2][:15]:
                found.append(int(child))
            found += children(int(child), module)
    return found


def killed_run(sorting: Path, output: Path, moments: list[Moment], rng: random.Random) -> KilledRun:
    """A new run, killed at these moments and then left to its end."""
    killed = KilledRun(output, rng)
    killed.file.write_text(yaml.safe_dump(recipe(sorting, output)))
    for moment in moments:
        killed.kill_at(moment)
    run(killed.file)
    return killed


@pytest.mark.vllm
def test_a_run_that_is_killed_in_every_stage(sorting, whole_run, tmp_path):
    """A checkpoint and an adapter half written, once each; a second training besides."""
    first, second = moments_of_round(1), moments_of_round(2)
    moments = [SFT[0], first[1], first[2], first[3], first[5], first[6], first[11], second[10]]
    kills, torn, runs = 0, 0, 0
    while (
        kills < 5 or torn < 1
    ):  # one run has eight; on a busy machine some moments are over before they are seen, and come again in another run
        killed = killed_run(sorting, tmp_path / f"killed{runs}", moments, random.Random(runs))
        assert results(killed.output) == results(whole_run[0])
        assert killed.spent() <= 1.1
        kills, torn, runs = kills + killed.kills.total(), torn + killed.torn, runs + 1
        assert runs < 20, f"{kills} kills, {torn} in the middle of a write"


@pytest.mark.slow
@pytest.mark.vllm
def test_sixty_kills(sorting, whole_run, tmp_path, capsys):
    """Runs that are killed at random moments until there were sixty kills; docs/reliability.md has what this prints."""
    rng, kills, torn, runs, spent = random.Random(1), Counter(), 0, 0, []
    while kills.total() < 60:
        moments = [*SFT, *moments_of_round(1), *moments_of_round(2)]
        chosen = sorted(rng.sample(range(len(moments)), 9))
        killed = killed_run(sorting, tmp_path / f"run{runs}", [moments[i] for i in chosen], rng)
        assert results(killed.output) == results(whole_run[0])
        kills, torn, runs = kills + killed.kills, torn + killed.torn, runs + 1
        spent.append(killed.spent())
    lines = [f"| {name} | {count} |" for name, count in kills.most_common()]
    lines += [f"{kills.total()} kills in {runs} runs, {torn} in the middle of a write; spent {max(spent):.3f} at most"]
    with capsys.disabled():
        sys.stdout.write("\n".join(["", *lines, ""]))
    assert max(spent) <= 1.1
