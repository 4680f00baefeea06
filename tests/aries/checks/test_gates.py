"""The guard, on pairs whose scores are known, and what the loop does with a round that it does not let through."""

import json
import shutil
from dataclasses import replace

import pytest
from tests.made_run import measure_pairs

from trl_ext.aries.checks.gates import decide, mean_interval, pair_lines
from trl_ext.aries.config import AriesConfig, EvaluationConfig, PairsConfig, PromptsConfig, ScoresConfig
from trl_ext.aries.data.pairs import Pair
from trl_ext.aries.data.records import Answer, Chain, read_jsonl, write_jsonl
from trl_ext.aries.policies import Policy, is_decided, policy_after
from trl_ext.aries.rounds import Rounds
from trl_ext.recipe import RecipeError


def pair(chosen_score, rejected_score, prompt_id="p", tokens=(4, 4)):
    draft, last = Answer(1, "a", tokens[1], "stop"), Answer(2, "b", tokens[0], "stop")
    return Pair(Chain(prompt_id, "x", [draft, last]), last, draft, chosen_score, rejected_score)


def test_means_and_their_difference_by_hand():
    """Chosen 1, 0, 1 and rejected 0, 1, 0 over the pairs that have both scores; 9 tokens against 6."""
    pairs = [pair(1.0, 0.0, "p", (1, 2)), pair(0.0, 1.0, "q", (2, 1)), pair(1.0, 0.0, "r", (2, 1))]
    measured = measure_pairs([*pairs, pair(None, 1.0, "s", (4, 2))])
    assert measured["compared"] == 3
    assert measured["chosen_score"] == pytest.approx(2 / 3) and measured["rejected_score"] == pytest.approx(1 / 3)
    assert measured["difference"] == pytest.approx(1 / 3)
    assert measured["length_ratio"] == 1.5


def test_differences_that_cancel_out_are_no_gain():
    """In floating point, 0.7 - 0.6 and 0.3 - 0.2 and their opposites: exactly 0 in any order, and the round is not better."""
    scores = [(0.7, 0.6), (0.2, 0.3), (0.3, 0.2), (0.6, 0.7)]
    measured = measure_pairs([pair(chosen, rejected, str(i)) for i, (chosen, rejected) in enumerate(scores)])
    assert measured["difference"] == 0
    assert decide(measured, "stop") == "stopped"


@pytest.mark.parametrize(
    ("difference", "decisions"),
    [
        (0.1, ("trained", "trained", "trained")),
        (0.0, ("stopped", "skipped", "warned")),
        (-0.1, ("stopped", "skipped", "warned")),
        (None, ("trained", "trained", "trained")),  # no scores: nothing to see
    ],
)
def test_decisions(difference, decisions):
    assert tuple(decide({"difference": difference}, guard) for guard in ("stop", "skip", "warn")) == decisions


def test_interval_is_that_of_the_mean():
    """
    400 values of 0 or 1, half each: the mean's standard error is 0.5 / 20 = 0.025, and the interval 0.5 ± 1.96 · 0.025 =
    0.451 to 0.549, up to the error of 1,000 resamples.
    """
    low, high = mean_interval([0.0, 1.0] * 200, [str(i) for i in range(400)])
    assert low == pytest.approx(0.451, abs=0.006) and high == pytest.approx(0.549, abs=0.006)


def test_interval_resamples_whole_prompts():
    """
    The same values as four equal pairs of each of 100 prompts: 100 independent values, an error of 0.05, 0.402 to 0.598. One
    prompt has no interval.
    """
    values = [float(i % 2) for i in range(100) for _ in range(4)]
    low, high = mean_interval(values, [str(i) for i in range(100) for _ in range(4)])
    assert low == pytest.approx(0.402, abs=0.012) and high == pytest.approx(0.598, abs=0.012)
    assert mean_interval([0.0, 1.0], ["p", "p"]) is None


def test_reports():
    assert pair_lines(measure_pairs([pair(1.0, 0.0)]), "trained") == []
    [line] = pair_lines(measure_pairs([pair(None, None)]), "trained")
    assert "`scores.verifier`" in line
    [line] = pair_lines(measure_pairs([pair(1.0, 0.0, tokens=(16, 10))]), "trained")
    assert "1.60 times as long" in line and "pairs.max_length_ratio" in line
    [line] = pair_lines(measure_pairs([pair(0.0, 1.0)]), "warned")
    assert "score 0.000 on average and the rejected ones 1.000 (difference -1.000, 1 pairs)" in line
    assert pair_lines(measure_pairs([pair(1.0, 0.0, tokens=(4, 0))]), "trained") == []  # no ratio to nothing


# In the loop


@pytest.fixture
def a_round(tmp_path):
    """
    A rule-based round 1 before its pairs, of four settled chains, whose last answers have the given scores and whose drafts
    have 0.5; made by the loop of a recipe with another `pairs.guard` if asked to.
    """
    config = AriesConfig(
        output_dir=str(tmp_path / "run"),
        model={"model_name_or_path": "m"},
        prompts=PromptsConfig("p.jsonl", per_round=4),
        evaluation=EvaluationConfig("e.jsonl"),
        training={"trainer": "dpo"},
        scores=ScoresConfig(verifier="v.py:f"),
        pairs=PairsConfig(selection="rule_based"),
    )

    def make(*last_scores: float | None, guard: str = "stop") -> Rounds:
        loop = Rounds(replace(config, pairs=replace(config.pairs, guard=guard)), inputs=None)
        round_dir = loop.dir.round(1)
        if last_scores:
            round_dir.path.mkdir(parents=True)
            chains = [
                Chain(f"p-{i}", "x", [Answer(k, text, 1, "stop") for k, text in enumerate("abb", start=1)])
                for i in range(len(last_scores))
            ]
            write_jsonl(round_dir.prompts, [{"prompt_id": chain.prompt_id, "prompt": "x"} for chain in chains])
            write_jsonl(round_dir.answers, [chain.to_row() for chain in chains])
            scores = [[0.5 if score is not None else None, score, score] for score in last_scores]
            write_jsonl(
                round_dir.scores,
                [{"prompt_id": chain.prompt_id, "scores": row} for chain, row in zip(chains, scores, strict=True)],
            )
        return loop

    return make


def decision(loop: Rounds, number: int = 1) -> str:
    return json.loads(loop.dir.round(number).guard.read_text())["decision"]


def test_a_round_whose_chosen_are_better_is_trained_on(a_round):
    loop = a_round(1.0, 1.0, 0.0)
    loop.pair(1)
    loop.guard(1)
    assert decision(loop) == "trained" and not is_decided(loop.dir.round(1), loop.config)


def test_without_scores_the_round_is_trained_on_and_the_run_says_what_it_cannot_see(a_round, capsys):
    loop = a_round(None, None)
    loop.pair(1)
    loop.guard(1)
    assert decision(loop) == "trained"
    assert "`scores.verifier`" in capsys.readouterr().out


def test_a_stopped_run_says_why_and_continues_only_when_told_to(a_round, capsys):
    """The pairs are kept to be looked at; the decision stays on resume, until `pairs.guard` is another."""
    loop = a_round(1.0, 0.0, 0.0, 0.25)
    loop.pair(1)
    assert len(read_jsonl(loop.dir.round(1).pairs)) == 12
    for again in (loop, a_round()):
        with pytest.raises(RecipeError, match="round 1 would train the policy away from its better answers") as error:
            again.guard(1)
        assert "the chosen answers score 0.312 on average and the rejected ones 0.500 (difference -0.188" in str(
            error.value
        )
        for way_out in ("best_over_worst", "learning_rate", "--pairs.guard skip", "--pairs.guard warn"):
            assert way_out in str(error.value)
        assert decision(loop) == "stopped" and not is_decided(loop.dir.round(1), loop.config)

    warned = a_round(guard="warn")
    warned.guard(1)
    assert decision(warned) == "warned" and not is_decided(warned.dir.round(1), warned.config)
    assert "likely make the policy worse" in capsys.readouterr().out
    a_round(guard="skip").guard(1)  # too late: the round was let through
    assert decision(loop) == "warned"


@pytest.mark.parametrize(
    ("bounds", "found"),
    [
        ({"min_settled": 0.8}, ["min_settled"]),
        ({"min_changed": 0.8}, ["min_changed"]),
        ({"min_settled": 0.75, "min_changed": 2 / 3}, []),
        ({}, []),
    ],
)
def test_the_rule_s_own_evidence(a_round, bounds, found):
    """
    Without scores, in round 1 all chains settle and change. In round 2, three of four settle, and of these two end with another answer than the
    draft. Each is as much as its bound, or less.
    """
    loop = a_round(None, None, None, None)
    loop.config = replace(loop.config, pairs=replace(loop.config.pairs, guard="stop", **bounds))
    shutil.copytree(loop.dir.round(1).path, loop.dir.round(2).path)
    loop.pair(1)
    loop.guard(1)
    assert decision(loop) == "trained"
    answers = [["a", "b", "b"], ["a", "b", "b"], ["b", "b", "b"], ["a", "b", "c"]]
    chains = [
        Chain(f"p-{i}", "x", [Answer(k, text, 1, "stop") for k, text in enumerate(texts, start=1)])
        for i, texts in enumerate(answers)
    ]
    write_jsonl(loop.dir.round(2).answers, [chain.to_row() for chain in chains])
    loop.pair(2)
    guard = json.loads(loop.dir.round(2).guard.read_text())
    assert guard["rule"] == {"whole": 4, "settled": 0.75, "changed": pytest.approx(2 / 3)}
    assert [name for name in ("min_settled", "min_changed") if name in " ".join(guard["findings"])] == found
    if found:
        with pytest.raises(RecipeError, match=f"`pairs.{found[0]}`"):
            loop.guard(2)
        skipped = a_round(guard="skip")
        skipped.guard(2)
        assert decision(skipped, 2) == "skipped"
    else:
        loop.guard(2)
        assert decision(loop, 2) == "trained"


def test_scorers_that_judge_see_a_best_over_worst_round(a_round):
    """
    Selected by scores of 0.5, 1 and 1, so the last answer is chosen over the draft. Those that judge have scored three of four chains: by
    them the chosen have 0, 0 and 1, and the rejected 1, 1 and 1.
    """
    loop = a_round(1.0, 1.0, 1.0, 1.0)
    loop.config = replace(
        loop.config,
        pairs=replace(loop.config.pairs, selection="best_over_worst"),
        evaluation=replace(loop.config.evaluation, scores=ScoresConfig(verifier="w.py:f")),
    )
    judged = [[1.0, 0.0, 0.0], [1.0, 0.5, 0.0], [1.0, 0.5, 1.0]]
    rows = [{"prompt_id": f"p-{i}", "scores": scores} for i, scores in enumerate(judged)]
    write_jsonl(loop.dir.round(1).guard_scores, rows)
    loop.pair(1)
    found = json.loads(loop.dir.round(1).guard.read_text())
    assert (found["decision"], found["by"], found["by_construction"]) == ("stopped", "evaluation.scores", False)
    assert found["compared"] == 3 and found["chosen_score"] == pytest.approx(1 / 3) and found["rejected_score"] == 1
    with pytest.raises(RecipeError, match="3 pairs, by `evaluation.scores`"):
        loop.guard(1)


def test_a_skipped_round_leaves_the_policy_as_it_was(a_round):
    loop = a_round(0.0, 0.0, guard="skip")
    loop.pair(1)
    loop.guard(1)
    loop.train(1)  # nothing to do: a child process would fail without a model
    assert decision(loop) == "skipped" and is_decided(loop.dir.round(1), loop.config)
    initial, skipped, trained = (policy_after(loop.dir, loop.config, number) for number in (0, 1, 2))
    assert skipped == initial == Policy("m", None)
    assert not loop.dir.round(1).model.exists()
    assert trained.model == str(loop.dir.round(2).model), "the next round trains on"


def test_a_skipped_round_that_was_killed_before_its_pairs_is_not_taken_as_done(a_round):
    loop = a_round(0.0, guard="skip")
    loop.pair(1)
    loop.dir.round(1).pairs.unlink()
    assert not is_decided(loop.dir.round(1), loop.config)
    loop.pair(1)
    assert is_decided(loop.dir.round(1), loop.config) and loop.dir.round(1).pairs.exists()


def test_the_guard_may_be_changed_in_a_run(a_round):
    for guard in ("stop", "warn"):
        loop = a_round(guard=guard)
        with loop.dir.opened(loop.config, "recipe: text\n", {}):
            pass
