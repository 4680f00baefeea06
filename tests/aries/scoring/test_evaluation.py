import math

import numpy as np
import pytest

from trl_ext.aries.data.records import Answer, Chain
from trl_ext.aries.scoring import evaluation
from trl_ext.aries.scoring.evaluation import (
    bootstrap_interval,
    comparison_interval,
    difference_interval,
    distinct,
    evaluation_metrics,
    is_binary,
    mean_interval,
    setbacks,
    share_interval,
    win_rate,
)


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
    assert (
        first
        | {
            "turn": 1,
            "score": pytest.approx(2 / 3),
            "standard_error": pytest.approx(1 / 3),
            "scored": 3,
            "answers": 3,
            "tokens": 4.0,
            "truncated": 0,
        }
        == first
    )
    assert (
        second
        | {
            "turn": 2,
            "score": 1.0,
            "standard_error": None,
            "scored": 1,
            "answers": 2,
            "tokens": 6.0,
            "truncated": 1,
        }
        == second
    )


def test_no_scores_at_all():
    metrics = evaluation_metrics([Chain("a", "x", [Answer(1, "t", 2, "stop")])], [[None]], turns=1)
    assert metrics["turns"][0]["score"] is None


def chains_of(texts: list[list[str]]) -> list[Chain]:
    """A chain per list, with answers of one token per word."""
    return [
        Chain(str(i), "x", [Answer(turn, text, len(text.split()), "stop") for turn, text in enumerate(row, start=1)])
        for i, row in enumerate(texts)
    ]


class TestBootstrap:
    @pytest.mark.parametrize(("n", "right"), [(2, 1), (4, 3), (20, 6), (500, 437)])
    def test_zeros_and_ones_are_binomial(self, n, right):
        """
        The mean of a resample of 0/1 scores is Binomial(n, p)/n. Its exact quantiles, give or take one step of 1/n for the
        resampling.
        """
        p = right / n
        below = np.cumsum([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)])
        exact = [int(np.argmax(below >= q)) for q in (0.025, 0.975)]
        found = bootstrap_interval([1.0] * right + [0.0] * (n - right), samples=10_000, seed=0)
        assert [value * n for value in found] == pytest.approx(exact, abs=1.01 if n > 4 else 1e-9)

    def test_covers_the_mean_it_estimates(self):
        """Of 400 samples of 50 from a skewed distribution with mean 1, 95 % of the intervals should hold 1, a little less for 50."""
        samples = np.random.default_rng(0).exponential(size=(400, 50))
        intervals = [bootstrap_interval(sample, samples=500, seed=i) for i, sample in enumerate(samples)]
        assert 0.88 <= np.mean([low <= 1 <= high for low, high in intervals]) <= 0.97

    def test_seed(self):
        values = list(np.random.default_rng(0).normal(size=100))
        first, again, other = (bootstrap_interval(values, samples=500, seed=seed) for seed in (1, 1, 2))
        assert first == again != other
        assert first == pytest.approx(other, abs=0.1)

    def test_drawn_in_pieces(self, monkeypatch):
        """Resamples are drawn in pieces where there are many: as many in all, so the same interval up to chance."""
        values = [0.0] * 30 + [1.0] * 70
        whole = bootstrap_interval(values, samples=5_000, seed=0)
        monkeypatch.setattr(evaluation, "_CHUNK", 777)
        assert bootstrap_interval(values, samples=5_000, seed=0) == pytest.approx(whole, abs=0.0101)

    def test_no_width_and_no_interval(self):
        assert bootstrap_interval([1.0, 1.0, 1.0], samples=10, seed=0) == [1.0, 1.0]
        assert bootstrap_interval([1.0], samples=10, seed=0) is None
        assert bootstrap_interval([], samples=10, seed=0) is None


class TestShares:
    @pytest.mark.parametrize(
        ("count", "total", "expected"),
        [(100, 100, [0.9630, 1.0]), (0, 10, [0.0, 0.2775]), (81, 263, [0.2553, 0.3662]), (15, 148, [0.0624, 0.1605])],
    )
    def test_wilson_by_hand(self, count, total, expected):
        """At the ends n / (n + z²) and z² / (n + z²); the others are published (Newcombe 1998, method 3)."""
        assert share_interval(count, total) == pytest.approx(expected, abs=5e-5)

    def test_covers_the_share_it_estimates(self):
        """Exact coverage of Wilson's interval at n = 50: never below 0.83 and 0.95 on average (Brown, Cai and DasGupta 2001)."""
        intervals = [share_interval(k, 50) for k in range(51)]
        shares = np.linspace(0.01, 0.99, 99)
        covered = [
            sum(
                math.comb(50, k) * p**k * (1 - p) ** (50 - k)
                for k, (low, high) in enumerate(intervals)
                if low <= p <= high
            )
            for p in shares
        ]
        assert min(covered) > 0.83 and abs(np.mean(covered) - 0.95) < 0.01

    def test_all_right_is_no_certainty(self):
        """100 of 100, in the metrics; scores that are no shares keep their bootstrap interval."""
        [turn] = evaluation_metrics(chains_of([["a"]] * 100), [[1.0]] * 100, 1)["turns"]
        assert turn["score"] == turn["correct"] == 1.0 and turn["interval"] == share_interval(100, 100)
        values = [0.2, 0.5, 0.9]
        assert mean_interval(values, 100, 0) == bootstrap_interval(values, 100, 0)
        assert share_interval(1, 1) is None

    def test_comparisons_by_hand(self):
        """
        Agresti and Min's example of 2005, the table (794, 150, 86, 570): the difference of the shares is 0.04 and its standard error
        0.0095, which half an observation in each cell leaves as they are. Without ties, it is a share's interval.
        """
        assert comparison_interval(150, 794 + 570, 86) == pytest.approx([0.0214, 0.0585], abs=2e-4)
        assert comparison_interval(3, 0, 1) == [2 * bound - 1 for bound in share_interval(3, 4)]
        low, high = comparison_interval(99, 1, 0)
        assert 0.9 < low < high == 1.0
        assert comparison_interval(1, 0, 0) is None
        assert difference_interval([1.0, 0.0, -1.0], 10, 0) == comparison_interval(1, 1, 1)


class TestWinRate:
    def test_by_hand(self):
        """Against 0.5: 1 wins, 0.5 ties, 0 loses, 2 wins; None on either side leaves the prompt out. (2 + 1/2) / 4."""
        found = win_rate([1.0, 0.5, 0.0, 2.0, None, 1.0], [0.5, 0.5, 0.5, 0.5, 0.5, None])
        assert found.pop("interval") == pytest.approx([(bound + 1) / 2 for bound in comparison_interval(2, 1, 1)])
        assert found == {"win_rate": 0.625, "wins": 2, "ties": 1, "losses": 1}

    def test_against_itself(self):
        """All ties: one half. Two are few: half a win and half a loss more in 4 give 1/2 ± z · √(1/4 · 1/4) / 2."""
        scores = [[0.1], [0.7], [None]]
        metrics = evaluation_metrics(chains_of([["a"]] * 3), scores, 1, initial=scores, previous=scores)
        for key in ("win_rate_round_0", "win_rate_previous"):
            assert metrics["turns"][0][key] == {
                "win_rate": 0.5,
                "interval": pytest.approx([0.5 - 1.959964 / 8, 0.5 + 1.959964 / 8]),
                "wins": 0,
                "ties": 2,
                "losses": 0,
            }

    def test_each_turn_meets_the_same_turn(self):
        metrics = evaluation_metrics(chains_of([["a", "b"]]), [[1.0, 0.0]], 2, initial=[[0.0, 1.0]], previous=[[1.0]])
        assert [turn["win_rate_round_0"]["win_rate"] for turn in metrics["turns"]] == [1.0, 0.0]
        assert metrics["turns"][0]["win_rate_previous"]["ties"] == 1
        assert metrics["turns"][1]["win_rate_previous"] is None

    def test_nothing_to_compare_with(self):
        metrics = evaluation_metrics(chains_of([["a"]]), [[1.0]], 1)
        assert metrics["turns"][0]["win_rate_round_0"] is None


class TestFlips:
    def test_by_hand(self):
        """y1 -> y2: 0->1 set right, 1->0 spoiled, 1->1 kept, 0->0 kept wrong, 0->1 set right; the last has no second score."""
        scores = [[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 1.0], [1.0, None]]
        first, second = evaluation_metrics(chains_of([["a", "b"]] * 6), scores, 2)["turns"]
        assert first["flips"] is None and first["changes"] is None
        assert second["flips"] == {"wrong_to_right": 2, "right_to_wrong": 1}
        assert second["changes"] == {"improved": 2, "worsened": 1, "same": 2}
        assert (first["correct"], second["correct"]) == (3 / 6, 3 / 5)

    def test_with_a_threshold(self):
        """At 0.5: 0.2->0.5 is set right, 0.9->0.4 spoiled, 0.6->0.7 stays right though it improves."""
        scores = [[0.2, 0.5], [0.9, 0.4], [0.6, 0.7]]
        metrics = evaluation_metrics(chains_of([["a", "b"]] * 3), scores, 2, correct_score=0.5)
        assert metrics["correct_score"] == 0.5
        assert metrics["turns"][1]["flips"] == {"wrong_to_right": 1, "right_to_wrong": 1}
        assert metrics["turns"][1]["changes"] == {"improved": 2, "worsened": 1, "same": 0}

    def test_without_one(self):
        metrics = evaluation_metrics(chains_of([["a", "b"]]), [[0.2, 0.5]], 2)
        assert metrics["correct_score"] is None
        assert metrics["turns"][1]["flips"] is None and metrics["turns"][1]["correct"] is None
        assert metrics["turns"][1]["changes"]["improved"] == 1

    def test_what_is_right_is_the_same_in_a_run(self):
        """All scores of this round are 0 or 1, and those of an earlier one are not: then none of either is right or wrong."""
        chains, scores = chains_of([["a", "b"]]), [[0.0, 1.0]]
        assert evaluation_metrics(chains, scores, 2)["correct_score"] == 1.0
        metrics = evaluation_metrics(chains, scores, 2, binary=False)
        assert metrics["correct_score"] is None and metrics["turns"][1]["flips"] is None

    @pytest.mark.parametrize(
        ("scores", "expected"),
        [
            ([[0.0, 1.0]], True),
            ([[1.0], [None]], True),
            ([[0.5, 1.0]], False),
            ([[None]], False),
            ([[2.0, 1.0]], False),
        ],
    )
    def test_what_is_zero_or_one(self, scores, expected):
        assert is_binary(scores) == expected


class TestLengthAndDiversity:
    def test_lengths_by_hand(self):
        """Tokens 1, 2, 3, 4, 10: quartiles 2, 3, 4; one of five cut off."""
        answers = [Answer(1, "a", tokens, "length" if tokens == 10 else "stop") for tokens in (4, 1, 10, 2, 3)]
        chains = [Chain(str(i), "x", [answer]) for i, answer in enumerate(answers)]
        [turn] = evaluation_metrics(chains, [[None]] * 5, 1)["turns"]
        assert turn["tokens"] == 4.0 and turn["token_quartiles"] == [2.0, 3.0, 4.0]
        assert turn["truncated"] == 1 and turn["truncated_share"] == 0.2

    def test_distinct_by_hand(self):
        """Words a b a, a b: 2 of 5 differ. Pairs ab, ba, ab: 2 of 3. No pair in a text of one word."""
        assert distinct(["a b a", "a b"], 1) == 2 / 5
        assert distinct(["a b a", "a b"], 2) == 2 / 3
        assert distinct(["a"], 2) is None

    def test_likeness_by_hand(self):
        """One answer kept, one with 2 of 3 words kept: difflib's ratio is 2·2/6. The third chain has no refinement."""
        first, second = evaluation_metrics(
            chains_of([["a b c", "a b c"], ["a b c", "a b d"], ["a"]]), [[None] * 2, [None] * 2, [None]], 2
        )["turns"]
        assert first["similarity"] is None and first["identical"] is None
        assert second["similarity"] == pytest.approx((1 + 2 / 3) / 2)
        assert second["identical"] == 0.5


def test_what_became_worse_is_said():
    """Six chains. y1 was wrong and is right; y2 was right in both rounds and is wrong: all six lose, win rate 0."""
    chains, now = chains_of([["a", "b"]] * 6), [[1.0, 0.0]] * 6
    before = {"initial": [[0.0, 1.0]] * 6, "previous": [[0.0, 1.0]] * 6}
    tail = "y2 wins 0.00 of the comparisons, 95 % interval 0.00 to 0.39, where 0.5 is no change"
    [line] = setbacks(evaluation_metrics(chains, now, 2, **before))
    assert line == f"y2 loses against the same answers of the round before: {tail}"

    before["previous"] = [[0.0, 0.0]] * 6  # already lost then
    [line] = setbacks(evaluation_metrics(chains, now, 2, **before))
    assert line == f"y2 loses against the same answers of round 0: {tail}"

    before = {"initial": [[1.0, 1.0]] * 6, "previous": [[1.0, 0.0]] * 6}
    now = [[0.0, 0.0]] * 6
    assert [line.partition(":")[0] for line in setbacks(evaluation_metrics(chains, now, 2, **before))] == [
        "y1 loses against the same answers of the round before",
        "y1, y2 lose against the same answers of round 0",
    ]


@pytest.mark.parametrize("now", [[[1.0, 1.0]] * 6, [[0.0, 1.0], [1.0, 0.0], *[[1.0, 1.0]] * 4]])
def test_no_change_and_chance_are_no_setback(now):
    """As good as before, and one loss in six: the interval reaches 0.5."""
    before = [[1.0, 1.0]] * 6
    metrics = evaluation_metrics(chains_of([["a", "b"]] * 6), now, 2, initial=before, previous=before)
    assert setbacks(metrics) == []


def test_without_rounds_to_compare_with_there_is_no_setback():
    assert setbacks(evaluation_metrics(chains_of([["a"]]), [[1.0]], 1)) == []
