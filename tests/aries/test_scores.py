import pytest

from trl_ext.aries.records import Answer, Chain
from trl_ext.aries.scores import load_verifier, score_chains
from trl_ext.recipe import RecipeError


CHAINS = [
    Chain("a", "1 +", [Answer(1, "2", 1, "stop"), Answer(2, "3", 1, "stop")]),
    Chain("b", [{"role": "user", "content": "2 +"}], [Answer(1, "4", 1, "stop")]),
]
PROMPTS = [
    {"prompt_id": "a", "prompt": "1 +", "solution": "3"},
    {"prompt_id": "b", "prompt": [{"role": "user", "content": "2 +"}], "solution": "4"},
]


def test_the_scorer_gets_trl_reward_function_arguments():
    seen = {}

    def scorer(prompts, completions, solution, **kwargs):
        seen.update(prompts=prompts, completions=completions, solution=solution, kwargs=kwargs)
        return [0.0, 1, None]

    rows = score_chains(CHAINS, PROMPTS, scorer)
    assert rows == [{"prompt_id": "a", "scores": [0.0, 1.0]}, {"prompt_id": "b", "scores": [None]}]
    assert seen == {
        "prompts": ["1 +", "1 +", [{"role": "user", "content": "2 +"}]],
        "completions": ["2", "3", [{"role": "assistant", "content": "4"}]],
        "solution": ["3", "3", "4"],
        "kwargs": {},
    }


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('solution')", r"`scorer` raised KeyError: 'solution'.*solution=\[\.\.\.\]"),
        ("return [1.0]", "returned 1 scores for 3 answers"),
        ("return None", "returned a NoneType for 3 answers"),
        ("return ['1', 0.0, 0.0]", "returned '1' for answer 1 of a.*finite number"),
        ("return [1.0, float('nan'), 0.0]", "returned nan for answer 2 of a.*finite number"),
    ],
)
def test_a_bad_scorer_is_named(tmp_path, body, message):
    file = tmp_path / "v.py"
    file.write_text(f"def scorer(prompts, completions, **kwargs):\n    {body}\n")
    with pytest.raises(RecipeError, match=message):
        score_chains(CHAINS, PROMPTS, load_verifier(f"{file}:scorer"))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("{file}", "names no file"),
        ("missing.py:exact", "names no file"),
        ("{file}:exact", r"has no function `exact`; it has \['other'\]"),
        ("{broken}:exact", "importing .*broken.py failed: ZeroDivisionError"),
    ],
)
def test_a_bad_reference_is_named(tmp_path, reference, message):
    (tmp_path / "v.py").write_text("def other(prompts, completions):\n    return []\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(RecipeError, match=message):
        load_verifier(reference.format(file=tmp_path / "v.py", broken=tmp_path / "broken.py"))


def test_the_quickstart_verifier():
    exact_match = load_verifier("recipes/quickstart/verifier.py:exact_match")
    answers = ["1 3", [{"role": "assistant", "content": "3 1"}], " 1 3 "]
    assert exact_match([None] * 3, answers, solution=["1 3"] * 3) == [1.0, 0.0, 1.0]


def test_a_reward_model_scores_as_transformers_does(tmp_path, tiny_model_path):
    """Oracle: the model's own logits on each text alone, unpadded."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from trl_ext.aries.scores import reward_model_scorer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompt = [{"role": "user", "content": "Sort : 2 1"}]
    chains = [Chain("a", prompt, [Answer(1, "1", 1, "stop"), Answer(2, "1 2 2", 3, "stop")])]
    reports = []
    scorer = reward_model_scorer(str(tmp_path), batch_size=4, progress=lambda *report: reports.append(report))
    [row] = score_chains(chains, [{"prompt_id": "a", "prompt": prompt}], scorer)
    expected = []
    for text in ("1", "1 2 2"):
        ids = tokenizer.apply_chat_template(
            [*prompt, {"role": "assistant", "content": text}], return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            expected.append(model(**ids).logits.item())
    assert row["scores"] == pytest.approx(expected, abs=1e-5)
    assert reports == [(2, 2)]


def test_a_classifier_is_not_a_reward_model(tmp_path, tiny_model_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from trl_ext.aries.scores import reward_model_scorer

    AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=3).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model_path).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="has 3 outputs, and a reward model has one"):
        reward_model_scorer(str(tmp_path), 4, lambda *_: None)
