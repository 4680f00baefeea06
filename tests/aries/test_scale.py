"""
A round's prompts, chains, scores and pairs stay on disk: memory grows by a few words for each of them and by no text, and the files are
those that lists in memory would give. The benchmark's engine answers at once.
"""

import json
import tracemalloc
import weakref
from array import array

import pytest
from tests.benchmarks.scale import InstantEngine, loop_of, score, write_prompts, write_rounds_prompts

from trl_ext.aries.checks.gates import mean_interval
from trl_ext.aries.config import PairsConfig, sampling_by_turn
from trl_ext.aries.data.pairs import preference_rows, select_pairs
from trl_ext.aries.data.records import read_jsonl
from trl_ext.aries.generation.chains import Task, answer_task
from trl_ext.aries.generation.refinements import Strategy
from trl_ext.aries.rounds import Rounds
from trl_ext.aries.scoring import scores as scores_module
from trl_ext.aries.scoring.scores import load_chains


@pytest.fixture
def a_round(tmp_path):
    """A function that makes the loop with so many prompts of round 1 written."""

    def make(count: int) -> Rounds:
        directory = tmp_path / str(count)
        directory.mkdir()
        write_prompts(directory / "train.jsonl", count, seed=0)
        write_prompts(directory / "eval.jsonl", 4, seed=1)
        loop = loop_of(directory, count)
        write_rounds_prompts(loop)
        return loop

    return make


def answer(loop: Rounds, engine: InstantEngine, window: int = 8) -> None:
    tasks = [
        (loop.dir.evaluation_prompts, loop.dir.round(0).evaluation),
        (loop.dir.round(1).prompts, loop.dir.round(1).answers),
    ]
    engine.window = window
    for prompts, answers in tasks:
        if not answers.exists():
            task = Task(prompts, answers, Strategy(loop.config.refinements), sampling_by_turn(loop.config), (0, 1))
            answer_task(engine, task, lambda done: None)


class LongAnswers(InstantEngine):
    """Its answers have 4,000 characters. It counts the chains that anything holds on to."""

    def __init__(self):
        super().__init__()
        self._texts = [f"{text} {'x' * 4000}" for text in self._texts[:10]]
        self.alive = self.most_alive = 0

    def submit(self, chain):
        if not chain.answers:
            self.alive += 1
            self.most_alive = max(self.most_alive, self.alive)
            weakref.finalize(chain, self.ended)
        return super().submit(chain)

    def ended(self):
        self.alive -= 1


def peak(stage, *arguments) -> int:
    tracemalloc.start()
    try:
        stage(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_texts(a_round, monkeypatch):
    """
    Four answers of 4,000 characters are 16 kB a chain. In memory may be its place and id (driver, pairs) and its answers' scores by
    key: a kilobyte, tables that double as they grow included.
    """
    monkeypatch.setattr(scores_module, "CHAINS_AT_ONCE", 50)
    peaks = {}
    for count in (200, 1000):
        loop, engine = a_round(count), LongAnswers()
        peaks[count] = {
            "answers": peak(answer, loop, engine),
            "scores": peak(score, loop),
            "pairs": peak(loop.pair, 1),
        }
        assert engine.most_alive <= 8 + 1  # those of the window, and the one that is drawn next
        assert engine.alive == 0
    growth = {stage: (peaks[1000][stage] - peaks[200][stage]) / 800 for stage in peaks[200]}
    assert max(growth.values()) < 1000, growth


def test_pairs_are_those_of_lists_in_memory(a_round):
    """Oracle: chains and scores as lists, and the guard's numbers from lists of their pairs."""
    loop = a_round(300)
    answer(loop, InstantEngine())
    loop.score(answering=0)
    loop.pair(1)
    round_dir = loop.dir.round(1)
    chains = load_chains(read_jsonl(round_dir.prompts), round_dir.answers)
    scores = [row["scores"] for row in read_jsonl(round_dir.scores)]
    pairs, dropped = select_pairs(chains, scores, PairsConfig())
    lines = [
        json.dumps(row, ensure_ascii=False) + "\n"
        for pair in pairs
        for row in preference_rows(pair, loop.template, PairsConfig())
    ]
    assert round_dir.pairs.read_text(encoding="utf-8") == "".join(lines)
    assert json.loads(round_dir.drops.read_text()) == {"chains": 300, "pairs": len(pairs), "dropped": dropped}
    assert dropped, "some chains have no margin"
    guard = json.loads(round_dir.guard.read_text())
    differences = [pair.chosen_score - pair.rejected_score for pair in pairs]
    assert guard["interval"] == mean_interval(differences, [pair.chain.prompt_id for pair in pairs])
    assert guard["interval"] == mean_interval(array("d", differences), [p.chain.prompt_id for p in pairs])
    assert guard["length_ratio"] == 1.0 and guard["compared"] == len(pairs)
