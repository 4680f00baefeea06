"""What an ARIES recipe may say, which key is named when it is wrong, and what it resolves to."""

import re
import subprocess
import sys

import pytest
from tests.aries.tiny_run import MINIMAL

from trl_ext.aries.config import AriesConfig, DatasetConfig, DraftsConfig, sampling_by_turn
from trl_ext.aries.config.templates import EVALUATION_TEMPLATE, TEMPLATES
from trl_ext.aries.data.prompts import load_rows
from trl_ext.aries.results.refine import resolve
from trl_ext.aries.training.settings import trainer_settings
from trl_ext.launch import find_accelerate_config
from trl_ext.recipe import Recipe, RecipeError, parse_section


DRAFTS = "{% for draft in drafts %}{{ draft }}{% endfor %}"


def parse(**sections) -> AriesConfig:
    """A whole recipe with these sections."""
    return parse_section(Recipe(None, {**MINIMAL, **sections}, {}), AriesConfig)


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        ("drafts", {"top_p": 0.0}, "`drafts.top_p` must be positive"),
        ("drafts", {"min_p": 1.5}, "`drafts.min_p` must be at most 1"),
        ("drafts", {"repetition_penalty": 0.0}, "`drafts.repetition_penalty` must be positive"),
        ("drafts", {"stop": [""]}, "`drafts.stop` has an empty text"),
        ("drafts", {"stop": "\\n"}, "`drafts.stop` has a backslash and a letter"),
        ("drafts", {"stop_token_ids": [-1]}, "`drafts.stop_token_ids[0]` must be at least 0"),
        ("refinements", {"strategy": "chains"}, "`refinements.strategy` must be one of 'chain'"),
        ("refinements", {"turns": 1}, "`refinements.turns` must be at least 2"),
        ("refinements", {"template": "Improve it."}, "`refinements.template` never mentions `draft`"),
        ("refinements", {"template": "{{ draft"}, "`refinements.template` is not valid Jinja2"),
        ("refinements", {"template": "{{ draft }}{{ hint }}"}, "`refinements.template` uses `hint`"),
        ("refinements", {"template": "{{ draft }}{{ critique }}"}, "`refinements.template` mentions `critique`"),
        (
            "refinements",
            {"strategy": "few_shot", "template": "{{ draft }}"},
            "`refinements.template` never mentions `drafts`",
        ),
        (
            "refinements",
            {"strategy": "self_evaluation", "template": "{{ draft }}"},
            "`refinements.template` never mentions `critique`",
        ),
        (
            "refinements",
            {"turns": 3, "template": ["{{ draft }}", "Improve it."]},
            "`refinements.template[1]` never mentions `draft`",
        ),
        ("refinements", {"template": ["{{ draft }}"]}, "`refinements.template` is a list of 1"),
        ("refinements", {"temperature": [0.5, 0.7]}, "`refinements.temperature` is a list of 2"),
        ("refinements", {"evaluation_template": "{{ draft }}"}, "`refinements.evaluation_template` asks for"),
        (
            "refinements",
            {"strategy": "self_evaluation", "evaluation_template": "Judge it."},
            "`refinements.evaluation_template` never mentions `draft`",
        ),
        (
            "refinements",
            {"strategy": "self_evaluation", "evaluation_template": "{{ draft }}{{ critique }}"},
            "`refinements.evaluation_template` mentions `critique`",
        ),
        ("refinements", {"temperature": -0.1}, "`refinements.temperature` must be at least 0"),
        ("refinements", {"temperature": "hot"}, "`refinements.temperature` must be a number or a list"),
        ("refinements", {"turns": 3, "top_p": [1.0, 1.5]}, "`refinements.top_p[1]` must be at most 1"),
        ("refinements", {"top_k": -2}, "`refinements.top_k` must be at least -1"),
        ("refinements", {"turns": 3, "max_tokens": [64, 2048]}, "`refinements.max_tokens[1]` (2048) leaves no room"),
        ("refinements", {"stop": ["a", ""]}, "`refinements.stop` has an empty text"),
        ("generation", {"answer_pattern": "</think>(.*"}, "`generation.answer_pattern` is not a regular expression"),
        ("generation", {"answer_pattern": "</think>.*"}, "`generation.answer_pattern` has 0 groups"),
        ("generation", {"answer_pattern": "(a|b)(.*)"}, "`generation.answer_pattern` has 2 groups"),
        ("pairs", {"selection": "rule_based", "min_margin": 0.5}, "`pairs.min_margin` is about scores"),
        ("pairs", {"selection": "rule_based", "min_chosen_score": 0.0}, "`pairs.min_chosen_score` is about scores"),
        ("pairs", {"selection": "rule_based", "max_rejected_score": 0.0}, "`pairs.max_rejected_score` is about"),
        ("scores", {"verifier": "v.py:f", "batch_size": 4}, "`batch_size` belongs to a `reward_model`"),
        ("scores", {"verifier": "v.py:f", "reward_model_revision": "v2"}, "`reward_model_revision` belongs to"),
        (
            "scores",
            {"scorers": [{"reward_model": "rm"}], "reward_model_backend": "vllm"},
            "`reward_model_backend` belongs to a `reward_model`, and none is named beside it",
        ),
        ("model", {"model_name_or_path": "m", "lora_r": 513}, "`model.lora_r` must be at most 512"),
        ("model", {}, "`model.model_name_or_path` is missing"),
        ("sft", {}, "`sft.dataset` is missing"),
        ("training", {"objective": "square"}, "`training.objective` must be one of 'logistic', 'squared'"),
        ("training", {"objective_alpha": 0.5}, "`training.objective_alpha` belongs to"),
        ("training", {"objective": "squared", "objective_alpha": 0.0}, "`training.objective_alpha` must be positive"),
        (
            "training",
            {"objective": "squared", "objective_alpha": "0.8"},
            "`training.objective_alpha` must be a number",
        ),
    ],
)
def test_refused(section, settings, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        parse(**{section: settings})


def test_models_and_folders_are_found_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = parse(model={"model_name_or_path": "~/m", "use_peft": True}, scores={"reward_model": "~/rm"})
    assert config.model == {"model_name_or_path": f"{tmp_path}/m", "use_peft": True}
    assert config.scores.reward_model == f"{tmp_path}/rm"
    assert parse(model={"model_name_or_path": "me/m"}).model["model_name_or_path"] == "me/m"
    for name in ("ddp.yaml", "data/train.jsonl", "adapter/adapter_config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"prompt": "x", "base_model_name_or_path": "~/m"}\n')
    assert find_accelerate_config("~/ddp.yaml", Recipe(None, {}, {})) == tmp_path / "ddp.yaml"
    assert list(load_rows(DatasetConfig("~/data"), "prompts.dataset"))[0]["prompt"] == "x"
    (tmp_path / "m").mkdir()
    refined = resolve(None, None, ["last"], {"adapter": "~/adapter"})
    assert (refined.model.model_name_or_path, refined.adapter) == (f"{tmp_path}/m", f"{tmp_path}/adapter")


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_that_no_generator_takes_are_refused(seed):
    with pytest.raises(RecipeError, match="`seed`"):
        parse(seed=seed)


def test_rules_about_the_last_answer_need_one():
    with pytest.raises(RecipeError, match="`pairs.selection: rule_based`"):
        parse(refinements={"strategy": "parallel"}, pairs={"selection": "rule_based"})
    with pytest.raises(RecipeError, match="pairs.refinement_rows"):
        parse(refinements={"strategy": "parallel"}, pairs={"refinement_rows": "both"})


@pytest.mark.parametrize("strategy", TEMPLATES)
def test_what_is_not_written_is_the_strategys_own(strategy):
    refinements = parse(refinements={"strategy": strategy}).refinements
    assert refinements.template == TEMPLATES[strategy]
    assert refinements.evaluation_template == (EVALUATION_TEMPLATE if strategy == "self_evaluation" else None)


@pytest.mark.parametrize(
    "refinements",
    [
        {"template": "{{ question }} {% for d in drafts %}{{ d }}{% endfor %}"},
        {"template": "{{ draft }} {% for i in range(turn) %}.{% endfor %}"},
        {"strategy": "few_shot", "template": DRAFTS},
        {"strategy": "self_evaluation", "template": DRAFTS + "{{ critique }}"},
    ],
)
def test_templates_that_are_taken(refinements):
    parse(refinements=refinements)


def test_refinements_are_sampled_as_the_drafts_unless_they_say_otherwise():
    drafts = {"temperature": 0.9, "top_p": 0.8, "top_k": 5, "max_tokens": 7}
    assert sampling_by_turn(parse(drafts=drafts)) == [DraftsConfig(**drafts)] * 4
    refinements = {"turns": 3, "temperature": 0.5, "top_p": 1, "top_k": 0, "max_tokens": [9, 11]}
    assert sampling_by_turn(parse(drafts=drafts, refinements=refinements)) == [
        DraftsConfig(**drafts),
        DraftsConfig(temperature=0.5, top_p=1.0, top_k=0, max_tokens=9),
        DraftsConfig(temperature=0.5, top_p=1.0, top_k=0, max_tokens=11),
    ]


def test_what_ends_an_answer_holds_for_refinements_unless_they_say_otherwise():
    drafts = {"stop": "\n", "stop_token_ids": [7], "min_p": 0.1, "repetition_penalty": 1.1}
    for refinements, expected in (
        ({}, (["\n"], [7], 0.1, 1.1)),
        ({"stop": ["\n\n", "Q:"], "min_p": 0.2}, (["\n\n", "Q:"], [7], 0.2, 1.1)),
        ({"stop": [], "stop_token_ids": [], "repetition_penalty": [1.0, 1.1, 1.2]}, ([], [], 0.1, 1.2)),
    ):
        *_, last = sampling_by_turn(parse(drafts=drafts, refinements=refinements))
        assert (last.stop, last.stop_token_ids, last.min_p, last.repetition_penalty) == expected


@pytest.mark.parametrize(
    ("training", "alpha"),
    [
        ({}, None),
        ({"objective": "logistic"}, None),
        ({"objective": "squared"}, 0.8),
        ({"objective": "squared", "objective_alpha": 0.5}, 0.5),
    ],
)
def test_the_objective_is_the_loops_and_alpha_the_trainers(training, alpha):
    """TDPO has an α of its own, under the same section."""
    settings = trainer_settings(parse(training={"trainer": "tdpo", "alpha": 0.3, **training}), 1, "out")
    assert (settings.trainer, settings.objective_alpha, settings.config["alpha"]) == ("tdpo", alpha, 0.3)
    assert not settings.config.keys() & {"objective", "objective_alpha", "trainer", "reference"}


def test_earlier_rounds_need_refinement_rows():
    with pytest.raises(RecipeError, match="`pairs.earlier_rounds` repeats refinement rows"):
        parse(pairs={"earlier_rounds": 1, "refinement_weight": 0})


@pytest.mark.parametrize("weight", ["refinement_weight", "direct_weight"])
def test_an_objective_without_its_rows_is_refused(weight):
    with pytest.raises(RecipeError, match=f"`pairs.{weight}: 0` leaves"):
        parse(training={"objective": "squared"}, pairs={weight: 0})


def test_without_direct_rows_the_objective_is_refining_alone():
    config = parse(training={"objective": "squared", "objective_alpha": 1.0}, pairs={"direct_weight": 0})
    assert (config.loop.alpha, config.pairs.direct_weight) == (1.0, 0)


def test_a_recipe_is_read_without_torch():
    code = "import sys, trl_ext.aries.config; print({'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
