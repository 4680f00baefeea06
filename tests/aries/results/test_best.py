"""The best round: which one it is, whether that is more than chance, and who asks for it."""

from dataclasses import replace

import pytest
from tests.made_run import make_run

from trl_ext.aries.config import AriesConfig
from trl_ext.aries.results.best import best_round
from trl_ext.aries.results.compare import Column, remarks
from trl_ext.aries.results.report_data import read_run
from trl_ext.aries.results.state import chosen_round
from trl_ext.aries.results.status import status
from trl_ext.cli import main
from trl_ext.recipe import RecipeError, load_yaml, parse_section


PROMPTS = 20


def run_of(tmp_path, *right, settings=None):
    """A finished run whose rounds have so many of 20 answers right at each of two turns."""
    scores = [[[float(i < y1), float(i < y2)] for i in range(PROMPTS)] for y1, y2 in right]
    texts = [[["a", "b"]] * PROMPTS] * len(right)
    run = make_run(tmp_path / "run", texts, scores, settings=settings)
    return run, run.read_config()


def test_by_hand(tmp_path):
    """
    Round 1 has 15 of 20 direct answers right, and round 2 has 5 of these: 10 discordant pairs, all one way. Agresti and Min: (10 + 1/2 − 1/2)
    over 22 is 0.4545, and half of the interval 1.96 · sqrt((0.5 − 0.4545²) / 22) = 0.226.
    """
    run, config = run_of(tmp_path, (10, 10), (15, 15), (5, 5))
    best = best_round(run, config)
    assert (best.number, best.name, best.score, best.last, best.last_score) == (1, "round 1", 0.75, 2, 0.25)
    assert best.difference == 0.5 and best.clear
    assert best.difference_interval == pytest.approx([0.228, 0.681], abs=2e-3)
    assert "round 1: y1 scores 0.750 [" in str(
        best
    ) and ", more than the last round's 0.250 (difference +0.500 [" in str(best)
    assert best_round(run, config, [0, 2]).number == 0


def test_the_later_of_equals_and_chance(tmp_path):
    run, config = run_of(tmp_path, (10, 9), (12, 9), (12, 9), (11, 12))
    best = best_round(run, config)
    assert best.number == 2 and not best.clear and "not clearly more" in str(best)
    last_turn = best_round(run, replace(config, evaluation=replace(config.evaluation, best_turn=2)))
    assert last_turn.number == last_turn.last == 3 and last_turn.difference is None


def test_how_many_prompts_it_is_about(tmp_path):
    """Round 1 is right wherever it has a score, which is on 3 of 4 prompts."""
    scores = [[[0.0]] * 4, [[1.0]] * 3 + [[None]], [[0.0]] * 4]
    run = make_run(tmp_path / "run", [[["a", "b"]] * 4] * 3, [[row * 2 for row in of_round] for of_round in scores])
    assert "round 1: y1 scores 1.000 [0.439, 1.000] on 3 of 4 prompts, not clearly more than" in str(
        best_round(run, run.read_config())
    )
    assert remarks([Column(letter, read_run(run.path), None) for letter in "AB"]) == [
        "B − A: paired over those of the 4 prompts that have both scores, with 95 % intervals."
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"scores": {"judge": {"base_url": "http://h/v1", "model": "m"}}},
        {"scores": {}, "pairs": {"selection": "rule_based"}},
    ],
)
def test_without_scores_that_compare_rounds_there_is_none(tmp_path, settings):
    run, config = run_of(tmp_path, (10, 10), (15, 15), settings=settings)
    assert best_round(run, config) is None
    with pytest.raises(RecipeError, match="`--round best`"):
        chosen_round(run, config, "best", [0, 1], "evaluated")


def test_it_can_be_named(tmp_path, capsys):
    run, config = run_of(tmp_path, (10, 10), (15, 15), (5, 16))
    assert chosen_round(run, config, "best", [0, 1, 2], "evaluated") == 1
    assert chosen_round(run, config, None, [0, 1, 2], "evaluated") == 2
    output = tmp_path / "answers.json"
    assert main(["aries", "answers", str(run.path), "--round", "best", "--output", str(output)]) == 0
    assert "of round 1 in" in capsys.readouterr().out
    by_y2 = ["--round", "best", "--evaluation.best_turn", "2", "--output", str(tmp_path / "by_y2.json")]
    assert main(["aries", "answers", str(run.path), *by_y2]) == 0
    assert "of round 2 in" in capsys.readouterr().out, "a key that may change later goes by the recipe of now"
    with pytest.raises(SystemExit):
        main(["aries", "answers", str(run.path), "--round", "worst", "--output", str(output)])
    assert "must be the number of a round, or best; got 'worst'" in capsys.readouterr().err


@pytest.mark.parametrize(("right", "said"), [(((10, 10), (15, 15), (5, 5)), True), (((10, 10), (15, 15)), False)])
def test_status_says_which_if_it_is_not_the_last(tmp_path, capsys, right, said):
    run, _ = run_of(tmp_path, *right)
    status(parse_section(load_yaml(run.recipe), AriesConfig))
    assert ("Best: round 1" in capsys.readouterr().out) == said


def test_status_says_that_no_round_can_do_better(tmp_path, capsys):
    run, _ = run_of(tmp_path, (PROMPTS, PROMPTS), (PROMPTS, PROMPTS))
    status(parse_section(load_yaml(run.recipe), AriesConfig))
    assert "Warning: round 0: all 20 direct answers" in " ".join(capsys.readouterr().out.split())
