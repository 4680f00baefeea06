"""
Verifiers, the cache of what was scored, and the sum of several scorers.
"""

import json
from pathlib import Path

import pytest

from trl_ext.aries.config import AriesConfig, ScorerConfig, ScoresConfig
from trl_ext.aries.data.records import Answer, Chain, write_jsonl
from trl_ext.aries.scoring.scores import (
    ScoreCache,
    ScoreTask,
    content_key,
    other_columns,
    score_rows,
)
from trl_ext.aries.scoring.verifier import Verifier, call_verifier, load_verifier
from trl_ext.recipe import Recipe, RecipeError, parse_section


CHAINS = [
    Chain("a", "1 +", [Answer(1, "2", 1, "stop"), Answer(2, "3", 1, "stop")]),
    Chain("b", [{"role": "user", "content": "2 +"}], [Answer(1, "4", 1, "stop")]),
]
PROMPTS = [
    {"prompt_id": "a", "prompt": "1 +", "solution": "3"},
    {"prompt_id": "b", "prompt": [{"role": "user", "content": "2 +"}], "solution": "4"},
]


def answers(chains=CHAINS, prompts=PROMPTS):
    names = other_columns(prompts)
    columns = [{name: prompt.get(name) for name in names} for prompt in prompts]
    return [(chain, answer, values) for chain, values in zip(chains, columns, strict=True) for answer in chain.answers]


def write_task(path: Path, chains=CHAINS, prompts=PROMPTS) -> ScoreTask:
    write_jsonl(path / "prompts.jsonl", prompts)
    write_jsonl(path / "answers.jsonl", (chain.to_row() for chain in chains))
    return ScoreTask(path / "prompts.jsonl", path / "answers.jsonl")


def silent(done, total):
    pass


class Fixed:
    """A scorer that gives every answer the scores it was made with, chain by chain."""

    def __init__(self, name, weight, scores):
        self.name, self.weight, self._scores = name, weight, scores

    def scores(self, block, cache):
        return [self._scores[chain.prompt_id] for chain, _ in block]


def test_the_scorer_gets_trl_reward_function_arguments():
    seen = {}

    def scorer(prompts, completions, solution, **kwargs):
        seen.update(prompts=prompts, completions=completions, solution=solution, kwargs=kwargs)
        return [0.0, 1, None]

    assert call_verifier(scorer, answers()) == [0.0, 1.0, None]
    assert seen == {
        "prompts": ["1 +", "1 +", [{"role": "user", "content": "2 +"}]],
        "completions": ["2", "3", [{"role": "assistant", "content": "4"}]],
        "solution": ["3", "3", "4"],
        "kwargs": {},
    }


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("raise KeyError('solution')", "KeyError: 'solution'"),
        ("return [1.0]", "1 scores for 3 answers"),
        ("return None", "NoneType"),
        ("return ['1', 0.0, 0.0]", "'1' for answer 1 of a"),
        ("return [10**400, 0.0, 0.0]", "for answer 1 of a"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("return [1.0, float('nan'), 0.0]", "nan for answer 2 of a"),
    ],
)
def test_a_bad_scorer_is_named(tmp_path, body, found):
    file = tmp_path / "v.py"
    file.write_text(f"def scorer(prompts, completions, **kwargs):\n    {body}\n")
    with pytest.raises(RecipeError, match=f"`scorer` .*{found}"):
        call_verifier(load_verifier(f"{file}:scorer"), answers())


@pytest.mark.parametrize(
    ("reference", "found"),
    [
        ("{file}", "v.py"),
        ("missing.py:exact", "missing.py"),
        ("{file}:exact", r"`exact`.*\['other'\]"),
        ("{broken}:exact", "broken.py .*ZeroDivisionError"),
    ],
)
def test_a_bad_reference_is_named(tmp_path, reference, found):
    (tmp_path / "v.py").write_text("def other(prompts, completions):\n    return []\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(RecipeError, match=f"`scores.verifier`: .*{found}"):
        load_verifier(reference.format(file=tmp_path / "v.py", broken=tmp_path / "broken.py"))


def test_the_quickstart_verifier():
    exact_match = load_verifier("recipes/quickstart/verifier.py:exact_match")
    answers = ["1 3", [{"role": "assistant", "content": "3 1"}], " 1 3 "]
    assert exact_match([None] * 3, answers, solution=["1 3"] * 3) == [1.0, 0.0, 1.0]


COUNTING = """
from pathlib import Path

CALLS = Path(__file__).with_name("calls")

def length(prompts, completions, **kwargs):
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    with open(CALLS, "a") as file:
        file.writelines(text + "\\n" for text in texts)
    return [float(len(text)) for text in texts]
"""


class TestCache:
    @pytest.fixture
    def verifier_file(self, tmp_path):
        file = tmp_path / "v.py"
        file.write_text(COUNTING)
        return file

    @staticmethod
    def score(file, task, cache_file):
        """Scores of the task, and the answers that the verifier was called with, over all calls so far."""
        cache = ScoreCache(cache_file)
        verifier = Verifier(ScorerConfig(verifier=f"{file}:length"))
        verifier.score([task], cache, silent)
        calls = file.with_name("calls")
        rows = score_rows(task, [verifier], cache)
        return [row["scores"] for row in rows], calls.read_text().split() if calls.exists() else []

    def test_an_answer_is_scored_once(self, verifier_file, tmp_path):
        task, cache = write_task(tmp_path), tmp_path / "cache.jsonl"
        expected = [[1.0, 1.0], [1.0]]
        assert self.score(verifier_file, task, cache) == (expected, ["2", "3", "4"])
        assert self.score(verifier_file, task, cache) == (expected, ["2", "3", "4"])

        # Another answer to the same prompt is new; one of another chain with all the same is not
        chains = [*CHAINS, Chain("c", "1 +", [Answer(1, "3", 1, "stop"), Answer(2, "44", 1, "stop")])]
        prompts = [*PROMPTS, {"prompt_id": "c", "prompt": "1 +", "solution": "3"}]
        (tmp_path / "more").mkdir()
        more = write_task(tmp_path / "more", chains, prompts)
        assert self.score(verifier_file, more, cache) == ([*expected, [1.0, 2.0]], ["2", "3", "4", "44"])

    def test_a_torn_line_is_scored_again(self, verifier_file, tmp_path):
        task, cache = write_task(tmp_path), tmp_path / "cache.jsonl"
        expected, _ = self.score(verifier_file, task, cache)
        cache.write_bytes(cache.read_bytes()[:-5])
        assert self.score(verifier_file, task, cache) == (expected, ["2", "3", "4", "4"])
        assert [set(json.loads(line)) for line in cache.read_text().splitlines()] == [{"key", "score"}] * 3

    @pytest.mark.parametrize("changed", ["verifier", "function", "prompt", "column"])
    def test_whatever_changes_is_scored_again(self, verifier_file, tmp_path, changed):
        cache = tmp_path / "cache.jsonl"
        self.score(verifier_file, write_task(tmp_path), cache)
        chains, prompts = CHAINS[:1], [dict(PROMPTS[0])]
        if changed == "verifier":
            verifier_file.write_text(COUNTING + "# another file\n")
        elif changed == "function":
            verifier_file.write_text(COUNTING)
            other = Verifier(ScorerConfig(verifier=f"{verifier_file}:length"))
            other._identity["verifier"] = "other"
            assert len(list(other.missing(write_task(tmp_path), ScoreCache(cache)))) == 3
            return
        elif changed == "prompt":
            prompts[0]["prompt"] = "5 +"
        else:
            prompts[0]["solution"] = "5"
        _, calls = self.score(verifier_file, write_task(tmp_path, chains, prompts), cache)
        assert calls == ["2", "3", "4", "2", "3"]

    def test_keys_do_not_depend_on_the_order_of_columns(self):
        assert content_key({"a": 1, "b": 2}) == content_key({"b": 2, "a": 1})
        assert content_key("ab", "c") != content_key("a", "bc")


class TestSeveralScorers:
    def test_weighted_sum(self, tmp_path):
        """0.5 * 1 - 2 * 3 = -5.5; an answer that one of them leaves out has no score."""
        scorers = [
            Fixed("v", 0.5, {"a": [1.0, 2.0], "b": [None]}),
            Fixed("r", -2.0, {"a": [3.0, None], "b": [1.0]}),
        ]
        assert list(score_rows(write_task(tmp_path), scorers, ScoreCache(tmp_path / "cache.jsonl"))) == [
            {"prompt_id": "a", "scores": [-5.5, None], "by_scorer": {"v": [1.0, 2.0], "r": [3.0, None]}},
            {"prompt_id": "b", "scores": [None], "by_scorer": {"v": [None], "r": [1.0]}},
        ]

    def test_nobody(self, tmp_path):
        rows = score_rows(write_task(tmp_path), [], ScoreCache(tmp_path / "cache.jsonl"))
        assert [row["scores"] for row in rows] == [[None, None], [None]]

    def test_both_forms_of_a_recipe(self):
        [single] = ScoresConfig(verifier="v.py:f").each()
        assert (single.name, single.weight, single.verifier) == ("verifier", 1.0, "v.py:f")
        recipe = {"scorers": [{"verifier": "v.py:f"}, {"reward_model": "rm", "weight": 0.1, "name": "big"}]}
        listed = parse_section(Recipe(None, recipe, {}), ScoresConfig).each()
        assert [(scorer.name, scorer.weight) for scorer in listed] == [("verifier", 1.0), ("big", 0.1)]
        assert ScoresConfig().each() == []

    @pytest.mark.parametrize(
        ("scores", "key"),
        [
            (
                {"verifier": "v.py:f", "reward_model": "rm"},
                "`verifier` and `reward_model` are given together.*`scores.scorers`",
            ),
            ({"reward_model": "rm", "scorers": [{"verifier": "v.py:f"}]}, "both `scorers` and a `reward_model`"),
            ({"scorers": []}, "`scores.scorers` is empty"),
            ({"scorers": [{"weight": 1.0}]}, r"`scorers\[0\]`: a scorer names a `verifier`"),
            ({"scorers": [{"verifier": "a.py:f"}, {"verifier": "b.py:f"}]}, "two called verifier. Give each a `name`"),
            ({"scorers": [{"verifier": "a.py:f", "weight": 0.0}]}, r"`scorers\[0\].weight` must not be 0"),
            ({"scorers": [{"verifier": "a.py:f", "name": "a/b"}]}, r"`scorers\[0\].name` .*'a/b'"),
            ({"judge": {"base_url": "localhost:8000", "model": "m"}}, "must start with http://.*'localhost:8000'"),
            (
                {"judge": {"base_url": "http://h/v1", "model": "m", "template": "{{ answer_a }}"}},
                "never mentions `answer_b`",
            ),
            (
                {"judge": {"base_url": "http://h/v1", "model": "m", "template": "{{ answer_a | best }}"}},
                "`judge.template` is not valid Jinja2: No filter named 'best'",
            ),
            ({"judge": {"base_url": "http://h/v1"}}, "`judge.model` is missing"),
        ],
    )
    def test_a_bad_section_is_named(self, scores, key):
        with pytest.raises(RecipeError, match=key):
            parse_section(Recipe(None, scores, {}), ScoresConfig)

    def test_best_over_worst_needs_one(self):
        needed = {
            "output_dir": "r",
            "model": {"model_name_or_path": "m"},
            "prompts": {"dataset": "p"},
            "evaluation": {"dataset": "e"},
            "training": {},
        }
        with pytest.raises(RecipeError, match="`judge`"):
            parse_section(Recipe(None, needed, {}), AriesConfig)


@pytest.mark.parametrize("value", ["float('nan')", "'1'"])
def test_a_verifier_is_tried_before_any_work(tmp_path, value):
    (tmp_path / "v.py").write_text(f"def f(prompts, completions, **kwargs):\n    return [{value}]\n")
    verifier = Verifier(ScorerConfig(verifier=f"{tmp_path}/v.py:f"))
    with pytest.raises(RecipeError, match="for answer 1 of a"):
        verifier.check([PROMPTS])
