import time
from itertools import product

import pytest

from trl_ext.aries.config import PairsConfig
from trl_ext.aries.data.pairs import Pair, preference_rows, rule_evidence, select_pairs, similarity
from trl_ext.aries.data.records import Answer, Chain
from trl_ext.aries.data.templates import compile_template


def chain(*texts, truncated=(), stopped=None, prompt="x"):
    answers = [
        Answer(turn, text, len(text.split()), "length" if turn in truncated else "stop")
        for turn, text in enumerate(texts, start=1)
    ]
    return Chain("p", prompt, answers, stopped)


def select(a_chain, scores, **config):
    pairs, dropped = select_pairs([a_chain], [scores], PairsConfig(**config))
    return pairs[0] if pairs else dropped


@pytest.mark.parametrize(
    ("scores", "chosen", "rejected"),
    [
        ([0.2, 0.9, 0.5, 0.1], 2, 4),  # best over worst
        ([0.0, 1.0, 1.0, 0.0], 3, 1),  # among equals the latest is chosen, the earliest rejected
        ([1.0, None, 0.0, None], 1, 3),  # answers without a score take no part
    ],
)
def test_best_over_worst(scores, chosen, rejected):
    pair = select(chain("a", "b", "c", "d"), scores)
    assert (pair.chosen.turn, pair.rejected.turn) == (chosen, rejected)
    assert (pair.chosen_score, pair.rejected_score) == (scores[chosen - 1], scores[rejected - 1])


@pytest.mark.parametrize(
    ("a_chain", "scores", "config", "reason"),
    [
        (chain("a", "b"), [0.5, 0.5], {}, "no_margin"),
        (chain("a", "b"), [0.5, 0.6], {"min_margin": 0.2}, "no_margin"),
        (chain("a", "a"), [0.0, 1.0], {}, "identical_answers"),
        (chain("a", " \n"), [0.0, 1.0], {}, "empty_answer"),
        (chain("a", "b"), [None, 1.0], {}, "fewer_than_two_scores"),
        (chain("a", stopped="prompt_too_long"), [1.0], {}, "prompt_too_long"),
        (chain("a", "b", truncated=(1, 2)), [0.0, 1.0], {}, "all_answers_truncated"),
        (chain("a", "b"), [0.0, 0.4], {"min_chosen_score": 0.5}, "chosen_score_too_low"),
        (chain("a", "b"), [0.6, 1.0], {"max_rejected_score": 0.5}, "rejected_score_too_high"),
    ],
)
def test_every_drop_has_its_reason(a_chain, scores, config, reason):
    assert select(a_chain, scores, **config) == {reason: 1}


def test_an_empty_answer_may_be_rejected():
    pair = select(chain("", "b"), [0.0, 1.0])
    assert (pair.chosen.turn, pair.rejected.turn) == (2, 1)


def test_a_truncated_answer_is_never_chosen_but_may_be_rejected():
    pair = select(chain("a", "b", "c", truncated=(1, 3)), [0.0, 0.5, 1.0])
    assert (pair.chosen.turn, pair.rejected.turn) == (2, 1)


def test_rule_based_takes_the_last_over_the_first_if_the_chain_has_settled():
    pair = select(chain("a b", "c d", "c d e", "c d e"), [None] * 4, selection="rule_based")
    assert (pair.chosen.turn, pair.rejected.turn, pair.chosen_score) == (4, 1, None)


@pytest.mark.parametrize(
    ("a_chain", "reason"),
    [
        (chain("a", "b", "c", "d"), "not_settled"),
        (chain("a", "b", "a", "a"), "identical_answers"),
        (chain("a", "b", "", ""), "empty_answer"),
        (chain("a", "b", "c", "c", truncated=(4,)), "last_answer_truncated"),
        (chain("a", stopped="prompt_too_long"), "prompt_too_long"),
        (chain("a", "b", stopped="prompt_too_long"), "prompt_too_long"),
    ],
)
def test_rule_based_drops(a_chain, reason):
    assert select(a_chain, [None] * len(a_chain.answers), selection="rule_based") == {reason: 1}


@pytest.mark.parametrize(
    ("texts", "agreement", "turn"),
    [
        (("a", "b", "c", "c"), 2, 4),
        (("a", "b", "c", "c"), 3, None),
        (("a", "c", "c", "c"), 3, 4),
        (("a", "b", "c", "c", "c"), 4, None),
        (("a", "b"), 3, 2),  # a draft and one refinement have nothing to settle
    ],
)
def test_how_many_must_agree(texts, agreement, turn):
    found = select(chain(*texts), [None] * len(texts), selection="rule_based", agreement=agreement)
    assert found == {"not_settled": 1} if turn is None else (found.chosen.turn, found.rejected.turn) == (turn, 1)


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (("so #### 3", "hence #### 4", "it must be that #### 4 "), None),  # other words, the same answer
        (("so #### 4", "hence #### 5", "it must be that #### 4"), "not_settled"),
        (("so #### 3", "4", "4"), "not_settled"),  # nothing found agrees with nothing
        (("so #### 4", "hence #### 4", "it must be that #### 4"), "draft_agrees"),
    ],
)
def test_agreement_on_a_part_of_the_answers(texts, reason):
    found = select(chain(*texts), [None] * 3, selection="rule_based", agreement_pattern=r"####\s*(.*)")
    assert found == {reason: 1} if reason else found.chosen.turn == 3


def test_similarity_of_answers_that_go_round_in_circles():
    """Exactly, the first two take more than a minute. Matches begin at the 2000 words that are rare, or at the beginning."""
    start = time.process_time()
    circle = "a b " * 1500
    assert similarity(circle, "a b c " * 1000) < 0.01
    assert similarity(circle, circle) == 1
    numbers = " ".join(map(str, range(2000)))
    assert similarity(f"{numbers} {circle}", f"{numbers} c {circle}") == pytest.approx(2 * 2000 / 10_001)
    assert time.process_time() - start < 20


@pytest.mark.parametrize("selection", ["best_over_worst", "rule_based"])
def test_a_margin_of_similarity(selection):
    """`a b c d` and `a b c e` share three of four words: a ratio of 0.75."""
    texts = chain("a b c d", "a b c e")
    assert select(texts, [0.0, 1.0], selection=selection, max_similarity=0.7) == {"too_similar": 1}
    assert select(texts, [0.0, 1.0], selection=selection, max_similarity=0.75).chosen.turn == 2


def test_what_the_rule_says_of_refining():
    """Of 10 chains, 2 have faults and 4 did not settle; of the 4 others, 2 end where they began and 1 says the same."""
    counts = {"prompt_too_long": 1, "empty_answer": 1, "not_settled": 4, "identical_answers": 2, "draft_agrees": 1}
    assert rule_evidence(10, counts) == {"whole": 8, "settled": 0.5, "changed": 0.25}
    assert rule_evidence(2, {"prompt_too_long": 2}) == {"whole": 0, "settled": None, "changed": None}
    assert rule_evidence(2, {"not_settled": 2}) == {"whole": 2, "settled": 0.0, "changed": None}


def test_counts_add_up():
    chains = [chain("a", "b"), chain("a", "a"), chain("a", "b")]
    pairs, dropped = select_pairs(chains, [[0, 1], [0, 1], [1, 1]], PairsConfig())
    assert len(pairs) + sum(dropped.values()) == len(chains)
    assert dropped == {"identical_answers": 1, "no_margin": 1}


# Several pairs of a chain, and their lengths


def turns(pairs):
    return [(pair.chosen.turn, pair.rejected.turn) for pair in pairs]


def test_next_best_over_next_worst():
    """By hand: scores 3 5 1 2 4 rank as turns 2 5 1 4 3, so 2 over 3, then 5 over 4; turn 1 is left and has no partner."""
    pairs, dropped = select_pairs(
        [chain("a", "b", "c", "d", "e")], [[3.0, 5.0, 1.0, 2.0, 4.0]], PairsConfig(pairs_per_prompt=3)
    )
    assert turns(pairs) == [(2, 3), (5, 4)]
    assert dropped == {"no_more_distinct_answers": 1}


def test_a_text_is_in_one_pair_only():
    """b came up twice: the later one is chosen, and the earlier is gone with it. So is the second of the two worst."""
    pairs, dropped = select_pairs(
        [chain("a", "b", "b", "a", "c", "d")], [[0.0, 1.0, 1.0, 0.0, 0.4, 0.6]], PairsConfig(pairs_per_prompt=2)
    )
    assert turns(pairs) == [(3, 1), (6, 5)]
    assert dropped == {}


@pytest.mark.parametrize(
    ("truncated", "config", "expected", "dropped"),
    [
        # What is wrong with the first pair does not keep the second from being made
        ((), {"max_length_ratio": 2.0}, [(3, 2)], {"chosen_too_long": 1}),
        ((), {"min_margin": 0.5}, [(4, 1)], {"no_margin": 1}),
        ((2, 3), {}, [(4, 1)], {"all_answers_truncated": 1}),
        ((), {"max_rejected_score": 0.1}, [(4, 1)], {"rejected_score_too_high": 1}),
        ((), {"min_chosen_score": 0.9}, [(4, 1)], {"chosen_score_too_low": 1}),
    ],
)
def test_each_pair_is_looked_at_alone(truncated, config, expected, dropped):
    """4 over 1 with three tokens against one, then 3 over 2 with one each."""
    a_chain = chain("a", "b", "c", "d d d", truncated=truncated)
    pairs, counts = select_pairs([a_chain], [[0.0, 0.3, 0.7, 1.0]], PairsConfig(pairs_per_prompt=2, **config))
    assert turns(pairs) == expected
    assert counts == dropped


def test_pairs_and_drops_add_up_whatever_the_answers():
    """
    Every chain of four answers with texts a, b, c and scores 0, 1, 2: k per chain, no text twice in a chain's pairs, chosen
    above rejected, and the first pair the one of `pairs_per_prompt: 1`.
    """
    chains = [chain(*texts) for texts in product("abc", repeat=4)]
    score_of = {"a": 0.0, "b": 1.0, "c": 2.0}
    for a_chain in chains:
        scores = [score_of[answer.text] for answer in a_chain.answers]
        pairs, dropped = select_pairs([a_chain], [scores], PairsConfig(pairs_per_prompt=3))
        first, _ = select_pairs([a_chain], [scores], PairsConfig())
        assert len(pairs) + sum(dropped.values()) == 3
        texts = [text for pair in pairs for text in (pair.chosen.text, pair.rejected.text)]
        assert len(set(texts)) == len(texts)
        assert all(pair.chosen_score > pair.rejected_score for pair in pairs)
        assert turns(pairs)[:1] == turns(first)


@pytest.mark.parametrize(("ratio", "reason"), [(None, None), (2.0, None), (1.9, "chosen_too_long")])
@pytest.mark.parametrize("selection", ["best_over_worst", "rule_based"])
def test_length_balance(selection, ratio, reason):
    """Four tokens over two, at any ratio two over four, and nothing over an answer without tokens."""
    config = {"selection": selection, "max_length_ratio": ratio}
    longer, shorter, over_nothing = (
        select(a_chain, [0.0, 1.0], **config)
        for a_chain in (chain("a a", "b b b b"), chain("a a a a", "b b"), chain("", "b"))
    )
    assert longer == {reason: 1} if reason else longer.chosen.tokens == 4
    assert shorter.chosen.tokens == 2
    assert over_nothing == {"chosen_too_long": 1} if ratio else over_nothing.chosen.tokens == 1


def test_rule_based_does_not_look_at_the_scores_but_keeps_them_for_the_guard():
    pair = select(chain("a", "b", "b"), [1.0, 0.0, 0.0], selection="rule_based")
    assert (pair.chosen.turn, pair.chosen_score, pair.rejected_score) == (3, 0.0, 1.0)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"pairs_per_prompt": 0}, "pairs_per_prompt"),
        ({"pairs_per_prompt": 2, "selection": "rule_based"}, "needs `pairs.selection: best_over_worst`"),
        ({"max_length_ratio": 0.9}, "max_length_ratio"),
        ({"min_settled": 0.5}, "`pairs.min_settled`.*`pairs.selection: rule_based`"),
        ({"agreement_pattern": "(a)"}, "`pairs.agreement_pattern`.*`pairs.selection: rule_based`"),
        ({"agreement_pattern": "a", "selection": "rule_based"}, "has 0 groups"),
        ({"agreement": 1, "selection": "rule_based"}, "agreement"),
        ({"drafts": "first"}, "drafts"),
        ({"refinement_rows": "neighbors", "selection": "rule_based"}, "needs `pairs.selection: best_over_worst`"),
    ],
)
def test_settings_without_a_meaning_are_refused(config, key):
    with pytest.raises(ValueError, match=key):
        PairsConfig(**config)


def test_rows_are_a_direct_pair_and_a_refinement_of_each_draft():
    """arXiv 2502.05605: prompt (x, y_l, z): y_w over y_l; prompt (x, y_w, z): y_w over y_l."""
    a_chain = chain("bad", "good", prompt=[{"role": "user", "content": "x"}])
    pair = Pair(a_chain, a_chain.answers[1], a_chain.answers[0], 1.0, 0.0)
    template = compile_template("{{ question }} | {{ draft }}")
    rows = preference_rows(pair, template, PairsConfig(direct_weight=2, refinement_weight=1))
    assert [(r["prompt"][0]["content"], r["turn"], r["draft"], r["weight"]) for r in rows] == [
        ("x", 0, None, 2),
        ("x | bad", 1, "rejected", 1),
        ("x | good", 1, "chosen", 1),
    ]
    assert all(r["chosen"] == [{"role": "assistant", "content": "good"}] for r in rows)
    assert all(r["rejected"] == [{"role": "assistant", "content": "bad"}] for r in rows)
    assert all((r["prompt_id"], r["chosen_turn"], r["rejected_turn"]) == ("p", 2, 1) for r in rows)


def test_plain_text_stays_plain_text_and_a_weight_of_0_leaves_rows_out():
    a_chain = chain(" bad", " good")
    pair = Pair(a_chain, a_chain.answers[1], a_chain.answers[0], 1.0, 0.0)
    [row] = preference_rows(pair, compile_template("{{ draft }}"), PairsConfig(refinement_weight=0))
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("x", " good", " bad")


# Refinement rows of other drafts, and of neighboring answers


def refinements(a_chain, scores, **config):
    """What the refinement rows of a chain say: draft, chosen and rejected text, and the column `draft`."""
    config = PairsConfig(**config)
    pairs, _ = select_pairs([a_chain], [scores], config)
    rows = [row for pair in pairs for row in preference_rows(pair, compile_template("{{ draft }}"), config)]
    return [(row["prompt"], row["chosen"], row["rejected"], row["draft"]) for row in rows if row["turn"] == 1]


@pytest.mark.parametrize(
    ("drafts", "expected"),
    [
        ("rejected", [("bad", "good", "bad", "rejected")]),
        ("chosen", [("good", "good", "bad", "chosen")]),
    ],
)
def test_drafts(drafts, expected):
    assert refinements(chain("bad", "good"), [0.0, 1.0], drafts=drafts) == expected


@pytest.mark.parametrize(
    ("a_chain", "scores", "config", "expected"),
    [
        # Each step up is its own row, and the last answer is best: it stays, over the worst
        (
            chain("a", "b", "c"),
            [0.0, 0.5, 1.0],
            {},
            [("a", "b", "a", "rejected"), ("b", "c", "b", "rejected"), ("c", "c", "a", "chosen")],
        ),
        # Refining spoils b, and mends c again. d is the best, as b is
        (
            chain("a", "b", "c", "d"),
            [0.0, 1.0, 0.0, 1.0],
            {},
            [
                ("a", "b", "a", "rejected"),
                ("b", "b", "c", "chosen"),
                ("c", "d", "c", "rejected"),
                ("d", "d", "a", "chosen"),
            ],
        ),
        # b changes nothing, and is not the best: neither a nor c over it, until c improves it
        (chain("a", "b", "c"), [0.0, 0.0, 1.0], {}, [("b", "c", "b", "rejected"), ("c", "c", "a", "chosen")]),
        # Settled: the two b are one row
        (chain("a", "b", "b"), [0.0, 1.0, 1.0], {}, [("a", "b", "a", "rejected"), ("b", "b", "a", "chosen")]),
        # c does not refine a
        (chain("a", "b", "c"), [0.0, None, 1.0], {}, [("c", "c", "a", "chosen")]),
        # What was cut off is not chosen
        (
            chain("a", "b", "c", truncated=(2,)),
            [0.0, 0.5, 1.0],
            {},
            [("b", "c", "b", "rejected"), ("c", "c", "a", "chosen")],
        ),
        # A pair's bounds are each row's: a step of 0.2 is too small
        (chain("a", "b", "c"), [0.0, 0.2, 1.0], {"min_margin": 0.3}, [("b", "c", "b", "rejected"), ("c", "c", "a", "chosen")]),
        (chain("a", "b", "c"), [0.0, 0.5, 1.0], {"drafts": "chosen"}, [("c", "c", "a", "chosen")]),
        # A chain without a pair has no rows
        (chain("a", "b"), [1.0, 1.0], {}, []),
    ],
)  # fmt: skip
def test_neighbors(a_chain, scores, config, expected):
    assert refinements(a_chain, scores, refinement_rows="neighbors", **config) == expected


def test_both_have_no_row_twice():
    """The pair is c over a: its two rows first, then a -> b and b -> c. That c stays is the pair's row already."""
    assert refinements(chain("a", "b", "c"), [0.0, 0.5, 1.0], refinement_rows="both") == [
        ("a", "c", "a", "rejected"),
        ("c", "c", "a", "chosen"),
        ("a", "b", "a", "rejected"),
        ("b", "c", "b", "rejected"),
    ]


def test_neighbors_come_once_with_a_chains_first_pair_and_are_not_counted():
    """Scores 3 5 1 2: 2 over 3, then 1 over 4. Steps: a -> b up, b stays over c, c -> d up."""
    config = PairsConfig(pairs_per_prompt=2, refinement_rows="neighbors")
    pairs, dropped = select_pairs([chain("a", "b", "c", "d")], [[3.0, 5.0, 1.0, 2.0]], config)
    assert turns(pairs) == [(2, 3), (1, 4)]
    assert dropped == {}
    rows = [row for pair in pairs for row in preference_rows(pair, compile_template("{{ draft }}"), config)]
    found = [(row["draft"], row["chosen_turn"], row["rejected_turn"], row["chosen_score"]) for row in rows]
    assert found == [(None, 2, 3, 5.0), ("rejected", 2, 1, 5.0), ("chosen", 2, 3, 5.0), ("rejected", 4, 3, 2.0), (None, 1, 4, 3.0)]  # fmt: skip
    assert len({tuple(row) for row in rows}) == 1  # the same columns
