"""
Thinking models: what is learned of a thought, under a chat template with the rule of Qwen3's, cut down to it: the last answer's thought
is written out, an answer without one gets an empty one, and the generation prompt has none.
"""

import io
import json

import pytest
from datasets import Dataset
from rich.console import Console
from tests.aries.tiny_run import MINIMAL
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from trl_ext.aries.checks.preflight import check_answers
from trl_ext.aries.config import AriesConfig, PairsConfig, RefinementsConfig
from trl_ext.aries.data.pairs import Pair, preference_rows
from trl_ext.aries.data.records import Answer, Chain
from trl_ext.aries.data.templates import compile_template
from trl_ext.aries.generation.drafts import full_text_problem, render_row
from trl_ext.aries.generation.refinements import Strategy
from trl_ext.doctor.aries_recipe import check_learned
from trl_ext.doctor.checks import Report
from trl_ext.recipe import Recipe, RecipeError, parse_section


BY_QWEN3 = (
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n"
    "{%- set parts = m.content.split('</think>') %}"
    "{%- if m.role == 'assistant' %}"
    "{{- '<think>\n' + parts[0].split('<think>')[-1].strip('\n') + '\n</think>\n\n' if parts | length > 1 else '<think>\n\n</think>\n\n' }}"
    "{%- endif %}{{ parts[-1].lstrip('\n') if m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
).replace("<|im_start|>{{ m.role }}\n{%-", "<|im_start|>{{ m.role + '\n' }}{%-")
# As DeepSeek's: what is before the answer is thrown away
DROPS = BY_QWEN3.replace("parts | length > 1", "false").replace("'<think>\n\n</think>\n\n' }}", "'' }}")
BEGUN = BY_QWEN3.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
GENERATED = "<think>\n3 is more\n</think>\n\n1 3"
PATTERN = r"(?s)</think>\s*(.*)"


@pytest.fixture(scope="module")
def thinking(tiny_model_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    tokenizer.chat_template = BY_QWEN3
    return tokenizer


def test_what_can_be_learned(thinking, tiny_model_path):
    assert full_text_problem(thinking) is None
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    tokenizer.chat_template = BEGUN  # the model's text begins inside the thought
    assert full_text_problem(tokenizer) is None
    tokenizer.chat_template = DROPS
    assert "so the thought would not be learned" in full_text_problem(tokenizer)


def pair_of(texts: list[str], learn: str) -> Pair:
    """The chain's draft rejected, its refinement chosen, as the engine's answers make them."""
    strategy = Strategy(RefinementsConfig(turns=2, template="{{ question }} {{ draft }}"), PATTERN, learn)
    chain = Chain("p", [{"role": "user", "content": "Sort : 3 1"}])
    for text in texts:
        strategy.add(chain, strategy.next_request(chain), text, 9, "stop")
    assert [answer.text for answer in chain.answers] == ["3 1", "1 3"]  # refined and scored in either case
    return Pair(chain, chain.answers[1], chain.answers[0], 1.0, 0.0)


@pytest.mark.parametrize("learn", ["answer", "full_text"])
def test_rows_hold_what_is_to_be_learned(learn, thinking, tiny_model_path, tmp_path):
    """Oracle: TRL's own tokenization of the row. What it trains on is, word for word, what the model generated and its end of turn."""
    texts = ["<think>\nas it was\n</think>\n\n3 1", GENERATED]
    template = compile_template("{{ question }} {{ draft }}")
    rows = preference_rows(pair_of(texts, learn), template, PairsConfig(learn=learn))
    assert "as it was" not in json.dumps([row["prompt"] for row in rows])
    thinking.pad_token = thinking.pad_token or thinking.eos_token
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_model_path),
        args=DPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None),
        train_dataset=Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]),
        processing_class=thinking,
    )
    expected = texts[1] if learn == "full_text" else "<think>\n\n</think>\n\n1 3"
    tokens = thinking(expected + "<|im_end|>\n", add_special_tokens=False)["input_ids"]
    assert [row["chosen_ids"] for row in trainer.train_dataset] == [tokens] * 3


def test_an_answer_without_a_full_text():
    """Without a pattern, or where it was not kept, the answer is all there is."""
    pair = Pair(Chain("p", "x"), Answer(1, "a", 1, "stop"), Answer(2, "b", 1, "stop", "b and more"), 1.0, 0.0)
    [row] = preference_rows(pair, compile_template("{{ draft }}"), PairsConfig(learn="full_text", refinement_weight=0))
    assert (row["chosen"], row["rejected"]) == ("a", "b and more")


def parse(**sections) -> AriesConfig:
    generation = {"answer_pattern": PATTERN}
    return parse_section(Recipe(None, {**MINIMAL, "generation": generation, **sections}, {}), AriesConfig)


@pytest.mark.parametrize(
    ("learn", "row", "warning"),
    [
        (
            "answer",
            "<think> </think> (the answer)<|im_end|>",
            "the chat template writes '<think>\\n\\n</think>\\n\\n' before an answer",
        ),
        ("full_text", "<think> (the thought) </think> (the answer)<|im_end|>", None),
    ],
)
def test_doctor_shows_the_row_and_what_the_template_adds(thinking, learn, row, warning):
    """On a tokenizer that keeps every character: the tiny one knows few words."""
    report = Report(Console(file=io.StringIO(), soft_wrap=True))
    prompt = [{"role": "user", "content": "Sort : 3 1"}]
    check_learned(parse(pairs={"learn": learn}), prompt, Characters(thinking), report)
    out = " ".join(report.console.file.getvalue().split())
    assert row in out and report.counts["warning"] == (warning is not None)
    assert warning is None or (warning in out and "set `pairs.learn: full_text`" in out)


class Characters:
    """The tiny tokenizer's chat template, with characters for tokens."""

    def __init__(self, tokenizer):
        self.apply_chat_template, self.eos_token = tokenizer.apply_chat_template, tokenizer.eos_token

    def __call__(self, text, add_special_tokens):
        return {"input_ids": list(map(ord, text))}

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_preflight_refuses_what_cannot_be_learned_or_met(tiny_model_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    tokenizer.chat_template = DROPS
    learns_all, nothing = parse(pairs={"learn": "full_text"}), Recipe(None, {}, {})
    with pytest.raises(RecipeError, match="`pairs.learn: full_text`: .*would not be learned.*plain text"):
        check_answers(tokenizer, learns_all, nothing, conversational=True)
    check_answers(tokenizer, parse(), nothing, conversational=True)
    check_answers(tokenizer, learns_all, nothing, conversational=False)
    with pytest.raises(
        RecipeError, match="`refinements.stop_token_ids` has 1000000, and the tokenizer has the tokens 0 to"
    ):
        check_answers(tokenizer, parse(refinements={"stop_token_ids": [1, 10**6]}), nothing, conversational=True)


def test_a_full_text_needs_a_pattern():
    with pytest.raises(RecipeError, match="`pairs.learn: full_text` needs `generation.answer_pattern`"):
        parse(generation={}, pairs={"learn": "full_text"})


def test_plain_text_ends_in_eos(thinking):
    assert render_row(thinking, "x ", "y") == "x y" + thinking.eos_token
