"""What a stage generates is looked at from the first 64 chains on. Counts by hand; the driver and the partial file are the real ones."""

import re

import pytest

from trl_ext.aries.config import DraftsConfig, HealthConfig, PairsConfig, RefinementsConfig
from trl_ext.aries.data.faults import FAULTS, fault
from trl_ext.aries.data.pairs import Pair, select_pairs
from trl_ext.aries.data.records import Answer, Chain, read_jsonl, write_jsonl
from trl_ext.aries.generation.chains import Task, answer_task
from trl_ext.aries.generation.intake import Intake
from trl_ext.aries.generation.refinements import Strategy
from trl_ext.recipe import RecipeError


def chain(name: str, *answers: tuple[str, str], stopped: str | None = None) -> Chain:
    made = [Answer(turn, text, 40, reason) for turn, (text, reason) in enumerate(answers, start=1)]
    return Chain(name, "x", made, stopped)


WHOLE, CUT_OFF, EMPTY = ("good", "stop"), ("and so on", "length"), (" ", "stop")


@pytest.mark.parametrize(
    ("answers", "stopped", "best", "rule"),
    [
        ([WHOLE, ("better", "stop")], None, None, None),
        ([CUT_OFF, WHOLE], None, None, None),
        ([WHOLE, CUT_OFF], None, None, "last_answer_truncated"),
        ([CUT_OFF, CUT_OFF], None, "all_answers_truncated", "last_answer_truncated"),
        ([EMPTY, EMPTY], None, "empty_answer", "empty_answer"),
        ([CUT_OFF, EMPTY], None, "empty_answer", "empty_answer"),
        ([WHOLE], "no_answer_found", "no_answer_found", "no_answer_found"),
        ([WHOLE, ("better", "stop")], "prompt_too_long", None, "prompt_too_long"),
        ([], "prompt_too_long", "prompt_too_long", "prompt_too_long"),
        ([WHOLE], None, "fewer_than_two_answers", "fewer_than_two_answers"),
    ],
)
def test_faults_are_those_that_no_score_can_mend(answers, stopped, best, rule):
    """Oracle: the selection itself, under scores that rise and scores that fall."""
    made = chain("p", *answers, stopped=stopped)
    for selection, expected in (("best_over_worst", best), ("rule_based", rule)):
        found = fault(made, selection)
        assert found == expected and (found is None or found in FAULTS)
        rising = [float(turn) for turn in range(len(answers))]
        for scores in (rising, rising[::-1]):
            pairs, dropped = select_pairs([made], [scores], PairsConfig(selection=selection))
            if found is not None:
                assert not pairs and not set(dropped) - {*FAULTS, "no_margin", "identical_answers"}
            assert all(isinstance(pair, Pair) for pair in pairs)


class Written:
    """An engine that answers each prompt by what it says, `cut`, `empty` or `whole`; the request that came last is first."""

    prompt_tokens = cached_tokens = 0

    def __init__(self, window: int):
        self.window = window
        self.requests = 0
        self._running: list[Chain] = []

    def start(self, task):
        self._strategy = task.strategy

    def submit(self, chain):
        request = self._strategy.next_request(chain)
        if request is None:
            return False
        self.requests += 1
        self._running.append((chain, request))
        return True

    def step(self):
        chain, request = self._running.pop()
        text, reason = {"cut": ("and so on", "length"), "empty": ("", "stop")}.get(chain.prompt, ("good", "stop"))
        self._strategy.add(chain, request, text, 40, reason)
        return [chain]


def answer(
    tmp_path, prompts: list[str], window: int = 16, bound: float | None = 0.5, drafts=None, tell=None
) -> tuple[Written, str]:
    """Answer prompts with two turns each; the engine, and what was found."""
    found = []

    def stop(text):
        found.append(text)
        raise RecipeError(text)

    file = tmp_path / "prompts.jsonl"
    write_jsonl(file, ({"prompt_id": f"p-{i}", "prompt": prompt} for i, prompt in enumerate(prompts)))
    strategy = Strategy(RefinementsConfig(strategy="parallel", turns=2))
    drafts = drafts or DraftsConfig(max_tokens=40)
    engine = Written(window)
    intake = Intake(HealthConfig(max_dropped=bound), "best_over_worst", drafts, tell or stop)
    try:
        task = Task(file, tmp_path / "answers.jsonl", strategy, [drafts] * 2, (0,), intake)
        answer_task(engine, task, lambda done: None)
    except RecipeError:
        pass
    return engine, "".join(found)


@pytest.mark.parametrize("window", [1, 16, 64])
def test_the_first_64_chains_are_enough(tmp_path, window):
    """All are cut off: it stops at the 33rd of the first 64 at the latest, or of all that were begun, and says what to set."""
    engine, found = answer(tmp_path, ["cut"] * 1000, window)
    assert engine.requests <= 2 * 64 + window
    assert re.match(r"33 of 64 first chains|6\d of 12\d chains so far", found) and "all_answers_truncated" in found
    assert "is the text 'and so on', cut off after 40 tokens. Raise `drafts.max_tokens`, now 40, or" in found
    assert '`drafts.stop: ["\\n"]`' in found
    assert not (tmp_path / "answers.jsonl").exists()


def test_on_continuing_it_is_the_same_look(tmp_path):
    """What was answered is in the file; it stops again after no more requests than a window's."""
    first, found = answer(tmp_path, ["cut"] * 1000)
    again, found_again = answer(tmp_path, ["cut"] * 1000)
    assert again.requests <= 2 * again.window < first.requests
    assert found.partition(".")[0].split()[3:] == found_again.partition(".")[0].split()[3:]
    _, nothing = answer(tmp_path, ["cut"] * 200, bound=None)
    assert not nothing and len(read_jsonl(tmp_path / "answers.jsonl")) == 200


def test_as_it_goes_on(tmp_path):
    """The first 100 are well and the others are not: more than half of those begun are faulty at about the 200th."""
    engine, found = answer(tmp_path, ["whole"] * 100 + ["empty"] * 900)
    assert 350 < engine.requests < 500 and "chains so far cannot be used (" in found and "empty_answer" in found
    assert "Look at the prompts with `trl-ext doctor --config`" in found


@pytest.mark.parametrize("prompts", [["cut"] * 32, ["cut", "whole"] * 500, ["cut"] * 32 + ["whole"] * 200])
def test_what_is_within_the_bound_goes_on(tmp_path, prompts):
    """Half of 64 is not more than half; fewer chains are for the end of the stage."""
    engine, found = answer(tmp_path, prompts)
    assert not found and engine.requests == 2 * len(prompts) and (tmp_path / "answers.jsonl").exists()


def test_those_that_finish_first_do_not_decide(tmp_path):
    """A third is too long and finishes at once, while a window of 500 others goes on: 167 of 500 begun are no more than half."""
    _, found = answer(tmp_path, ["cut", "whole", "whole"] * 200, window=500)
    assert not found


def test_a_note_is_said_once_and_ends_nothing(tmp_path):
    notes = []
    engine, _ = answer(tmp_path, ["cut"] * 200, tell=notes.append, drafts=DraftsConfig(max_tokens=40, stop="\n"))
    assert len(notes) == 1 and engine.requests == 400 and "Raise `drafts.max_tokens`, now 40." in notes[0]


def test_a_text_without_an_answer_is_shown():
    health = HealthConfig(max_dropped=0.0)
    for reason, advice in (
        ("length", "Raise `drafts.max_tokens`"),
        ("stop", "`generation.answer_pattern` finds no answer"),
    ):
        found = []
        intake = Intake(health, "best_over_worst", DraftsConfig(), found.append)
        for i in range(64):
            made = Chain(f"p-{i}", "x", [], "no_answer_found", [Answer(1, "", 9, reason, "<think> hm")])
            [_] = intake.begun([made])
            intake.look(made)
        assert "the text '<think> hm'" in found[0] and advice in found[0] and "no_answer_found" in found[0]
