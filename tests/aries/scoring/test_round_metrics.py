"""Scorers that judge beside those that select: who scores what, what the metrics go by, and where the two part."""

import io
from pathlib import Path

import pytest

from trl_ext.aries.checks.preflight import scorer_keys
from trl_ext.aries.children import Reporter
from trl_ext.aries.config import AriesConfig
from trl_ext.aries.data.records import Answer, Chain, read_jsonl, write_jsonl
from trl_ext.aries.inputs import local_inputs
from trl_ext.aries.policies import scored, unscored
from trl_ext.aries.run_dir import RunDir
from trl_ext.aries.scoring.evaluation import ceiling, evaluation_metrics
from trl_ext.aries.scoring.round_metrics import round_metrics, round_setbacks, round_warnings
from trl_ext.aries.scoring.scoring import score
from trl_ext.recipe import Recipe, RecipeError, parse_section


VERIFIERS = """
def length(prompts, completions, **kwargs):
    return [float(len(text)) for text in completions]


def short(prompts, completions, **kwargs):
    return [float(len(text) < 3) for text in completions]
"""
JUDGE = {"judge": {"base_url": "http://h/v1", "model": "m"}}


@pytest.fixture
def make(tmp_path):
    """A run's directory and recipe, with some other keys."""

    def make(**changes) -> tuple[RunDir, AriesConfig]:
        (tmp_path / "v.py").write_text(VERIFIERS)
        (tmp_path / "run" / "logs").mkdir(parents=True, exist_ok=True)
        recipe = {
            "output_dir": str(tmp_path / "run"),
            "rounds": 1,
            "model": {"model_name_or_path": "m"},
            "prompts": {"dataset": "p.jsonl"},
            "evaluation": {"dataset": "e.jsonl", "scores": {"verifier": f"{tmp_path}/v.py:short"}},
            "scores": {"verifier": f"{tmp_path}/v.py:length"},
            "refinements": {"turns": 2},
            "training": {"trainer": "dpo"},
            **changes,
        }
        config = parse_section(Recipe(None, recipe, {}), AriesConfig)
        return RunDir(Path(config.output_dir)), config

    return make


@pytest.fixture
def report() -> Reporter:
    return Reporter(io.StringIO())


def write_answers(prompts: Path, answers: Path, texts: list[str]) -> None:
    answers.parent.mkdir(parents=True, exist_ok=True)
    chains = [Chain(f"p-{i}", "x", [Answer(1, text, 1, "stop")]) for i, text in enumerate(texts)]
    write_jsonl(prompts, [{"prompt_id": chain.prompt_id, "prompt": "x"} for chain in chains])
    write_jsonl(answers, [chain.to_row() for chain in chains])


def scores_of(path: Path) -> list[float]:
    return [row["scores"][0] for row in read_jsonl(path)]


class TestWhoScoresWhat:
    def test_those_that_select_judge_unless_others_do(self, make):
        """Files by section. Judges of their own score the evaluation, and some chains of the next round for the guard."""
        run, config = make(evaluation={"dataset": "e.jsonl"})
        assert [(file.by, file.scores.name) for file in scored(run, config, 0)] == [
            ("scores", "evaluation_scores.jsonl"),
            ("scores", "scores.jsonl"),
        ]
        run, config = make()
        assert [(file.by, file.scores.name, file.chains) for file in scored(run, config, 0)] == [
            ("evaluation.scores", "evaluation_scores.jsonl", None),
            ("scores", "selecting_scores.jsonl", None),
            ("scores", "scores.jsonl", None),
            ("evaluation.scores", "guard_scores.jsonl", 200),
        ]
        assert [file.scores.name for file in scored(run, config, 1)] == [
            "evaluation_scores.jsonl",
            "selecting_scores.jsonl",
        ]
        run, config = make(pairs={"guard_samples": 0})
        assert "guard_scores.jsonl" not in {file.scores.name for file in scored(run, config, 0)}

    def test_nobody_selects_by_scores(self, make):
        run, config = make(scores={}, pairs={"selection": "rule_based"})
        assert [file.scores.name for file in scored(run, config, 0)] == [
            "evaluation_scores.jsonl",
            "scores.jsonl",
            "guard_scores.jsonl",
        ]

    def test_files_by_hand(self, make, tmp_path, report):
        """Texts of 1, 2 and 3 characters: `length` gives 1, 2, 3, and `short` 1, 1, 0; of the round, the first two chains for the guard."""
        run, config = make(pairs={"guard_samples": 2})
        first, second = run.round(0), run.round(1)
        write_answers(run.evaluation_prompts, first.evaluation, ["a", "bb", "ccc"])
        write_answers(second.prompts, second.answers, ["ccc", "bb", "a"])
        score(run, config, 0, report)
        assert scores_of(first.evaluation_scores) == [1, 1, 0] and scores_of(first.selecting_scores) == [1, 2, 3]
        assert scores_of(second.scores) == [3, 2, 1] and scores_of(second.guard_scores) == [0, 1]
        assert not unscored(run, config, 0)

    @pytest.mark.parametrize("scores", [{}, {"scorers": []}, {"verifier": "v.py:f", "reward_model": "rm"}])
    def test_a_section_that_names_nobody_is_refused(self, make, scores):
        with pytest.raises(
            RecipeError, match="`evaluation.scores|`verifier` and `reward_model`|`scores.scorers` is empty"
        ):
            make(evaluation={"dataset": "e.jsonl", "scores": scores})


def test_what_judges_is_an_input_of_the_run(make, tmp_path):
    """A run does not continue with another verifier under the same name; and an error names the key at which it was written."""
    _, config = make(scores={"scorers": [{"verifier": f"{tmp_path}/v.py:length", "name": "long"}]})
    found = local_inputs(config, None)
    assert {key for key in found if "scores" in key} == {"scores.scorers.long", "evaluation.scores.verifier"}
    assert found["evaluation.scores.verifier"] == tmp_path / "v.py"
    assert [keys for keys, _ in scorer_keys(config)] == [("scores", "scorers", 0), ("evaluation", "scores")]


class TestRounds:
    """Twenty evaluation prompts whose answers are `xx` in round 0, and longer in round 1."""

    def run(self, make, texts: list[str], report, **changes):
        run, config = make(**changes)
        for number, text in enumerate(texts):
            write_answers(run.evaluation_prompts, run.round(number).evaluation, [text] * 20)
            if number < config.rounds:
                write_answers(run.round(number + 1).prompts, run.round(number + 1).answers, [text])
            score(run, config, number, report)
        return run, config

    def test_where_they_part(self, make, report):
        """
        Longer answers, up from 2 to 4 characters, and none of them short: all 20 comparisons won by what selects, all lost by what judges.
        """
        run, config = self.run(make, ["xx", "xxxx"], report)
        metrics = round_metrics(run, config, 1)
        assert metrics["turns"][0]["score"] == 0 and metrics["selecting"][0]["score"] == 4
        assert metrics["selecting"][0]["win_rate_previous"]["wins"] == 20
        # In round 1 both comparisons are with round 0
        [line] = round_warnings(run, config, 1, metrics)
        assert "y1 wins 1.00 of the comparisons by the one, 0.00 by the other" in line
        assert len(round_setbacks(config, metrics)) == 1

    @pytest.mark.parametrize("texts", [["xx", "xx"], ["x", "xx"], ["xxxx", "xx"]])
    def test_no_parting(self, make, report, texts):
        """Nothing changes; what selects rises and what judges stays; what selects falls and what judges rises."""
        run, config = self.run(make, texts, report)
        assert round_warnings(run, config, 1, round_metrics(run, config, 1)) == []

    def test_a_judge_does_not_compare_rounds(self, make, report):
        run, config = self.run(make, ["xx", "xxxx"], report)
        metrics = round_metrics(run, config, 1)
        _, judged = make(evaluation={"dataset": "e.jsonl", "scores": JUDGE})
        assert round_setbacks(judged, metrics) == [] and round_warnings(run, judged, 1, metrics) == []
        _, selected = make(scores=JUDGE)
        assert len(round_setbacks(selected, metrics)) == 1 and round_warnings(run, selected, 1, metrics) == []

    def test_without_judges_there_is_nothing_more(self, make, report):
        run, config = self.run(make, ["xx", "xxxx"], report, evaluation={"dataset": "e.jsonl"})
        assert "selecting" not in round_metrics(run, config, 1)


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ([[1.0], [1.0]], "at the ceiling"),
        ([[0.0], [0.0]], "the same score, 0"),
        ([[2.5], [2.5], [None]], "the same score, 2.5"),
        ([[0.0], [1.0]], None),
        ([[1.0]], None),
        ([[None], [None]], None),
    ],
)
def test_an_initial_policy_that_cannot_get_better(scores, said):
    chains = [Chain(f"p-{i}", "x", [Answer(1, "a", 1, "stop")]) for i in range(len(scores))]
    found = ceiling(evaluation_metrics(chains, scores, turns=1), scores)
    assert said in found if said else found is None
