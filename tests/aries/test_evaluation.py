import pytest

from trl_ext.aries.evaluation import evaluation_metrics
from trl_ext.aries.records import Answer, Chain


def test_means_and_standard_errors_by_hand():
    """
    Scores of y1: 0, 1, 1 -> mean 2/3, sample variance 1/3, standard error sqrt(1/3 / 3) = 1/3. y2: one chain ended early
    and one answer has no score, so one score is left: 1, without a standard error.
    """
    chains = [
        Chain("a", "x", [Answer(1, "t", 2, "stop"), Answer(2, "t", 4, "length")]),
        Chain("b", "x", [Answer(1, "t", 4, "stop")], "prompt_too_long"),
        Chain("c", "x", [Answer(1, "t", 6, "stop"), Answer(2, "t", 8, "stop")]),
    ]
    metrics = evaluation_metrics(chains, [[0.0, 1.0], [1.0], [1.0, None]], turns=2)
    first, second = metrics["turns"]
    assert metrics["prompts"] == 3
    assert first == {
        "turn": 1,
        "score": pytest.approx(2 / 3),
        "standard_error": pytest.approx(1 / 3),
        "scored": 3,
        "answers": 3,
        "tokens": 4.0,
        "truncated": 0,
    }
    assert second == {
        "turn": 2,
        "score": 1.0,
        "standard_error": None,
        "scored": 1,
        "answers": 2,
        "tokens": 6.0,
        "truncated": 1,
    }


def test_no_scores_at_all():
    metrics = evaluation_metrics([Chain("a", "x", [Answer(1, "t", 2, "stop")])], [[None]], turns=1)
    assert metrics["turns"][0]["score"] is None
