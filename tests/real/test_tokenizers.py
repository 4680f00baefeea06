"""
Both trainers with the real chat templates of Llama 3.1, Qwen3 and Gemma 3. Oracle: TRL's `DPOTrainer` on the same rows; token ids, masks
and losses must be its own if the methods are DPO (α = 0, λ = 0).
"""

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

from tests.rows.shapes import CONVERTED, assistant, system, user
from tests.rows.test_pairs import ids
from trl_ext import SelfRefineDPOConfig, SelfRefineDPOTrainer, TDPOConfig, TDPOTrainer
from trl_ext.rows.judge import TOKENS
from trl_ext.trainers.prepared import prepared_pairs


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}


def pair(prompt: list[dict], chosen: str, rejected: str, **columns) -> dict:
    return {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)], **columns}


THOUGHT = "<think>\nOne and two are three.\n</think>\n\n"
SCENES = {
    "one turn": [pair([user("Why do cats purr?")], "They are content.", "Engines.")],
    "system": [pair([system("You are a pirate."), user("Who goes there?")], "Arr, 'tis me.", "A person.")],
    "turns": [
        pair([user("Name a prime."), assistant("Seven."), user("A larger one?")], "Eleven.", "Twelve."),
        pair(
            [user("Hello!"), assistant("Hello."), user("What is it?"), assistant("A cat."), user("Why?")],
            "It purrs.",
            "No.",
        ),
    ],
    "thinking": [pair([user("One and two?")], f"{THOUGHT}Three.", f"{THOUGHT}Four.")],
    "no thinking": [
        pair([user("One and two?")], "Three.", "Four.", chat_template_kwargs={"enable_thinking": False}),
    ],
    "tools": [pair([user("Is it warm in Oslo?")], "I would have to look.", "Yes.", tools=[TOOL])],
    "right to left": [pair([user("ما هي عاصمة مصر؟")], "القاهرة.", "דמשק היא התשובה.")],
    "emoji": [pair([user("👩‍👩‍👧‍👦 and 🇳🇴?")], "A family 👨‍👩‍👦 and a flag 🏳️‍🌈.", "😀😀😀")],
    "white space": [pair([user("  Two spaces\n\nand lines  ")], "\n\nYes \t", "No\r\n")],
}


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    """A random Llama with as many embeddings as the tokenizer has entries."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=4096, **sizes)
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def rows_of(scenes: list[str]) -> Dataset:
    return Dataset.from_list([row for scene in scenes for row in SCENES[scene]], on_mixed_types="use_json")


METHODS = [
    (TDPOTrainer, TDPOConfig, {"alpha": 0.0}),
    (SelfRefineDPOTrainer, SelfRefineDPOConfig, {"refinement_weight": 0.0}),
]


@pytest.mark.parametrize("truncated", [False, True], ids=["whole", "truncated"])
def test_ids_masks_and_losses_are_those_of_dpo(truncated, model, tokenizer, tmp_path):
    """Ids and masks of all rows; the loss of the two shortest, since each token has hundreds of thousands of logits."""
    dataset = rows_of(list(SCENES))
    common = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False, "beta": 1.0}
    if truncated:
        prompts = ids(dataset.to_list(), tokenizer, DPOConfig(str(tmp_path), **common))["prompt_ids"]
        common["max_length"] = min(map(len, prompts)) + 12

    def token_ids(trainer):
        return list(zip(*(trainer.train_dataset[column][:] for column in TOKENS), strict=True))

    def batch_of(trainer, rows):
        return trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset.select(rows))))

    def loss(trainer, rows):
        with torch.no_grad():  # another policy than the reference
            for parameter in trainer.model.model.layers.parameters():
                parameter.add_(torch.sin(torch.arange(parameter.numel()).float()).view_as(parameter), alpha=0.2)
            return trainer.compute_loss(trainer.model, batch_of(trainer, rows))

    # DPOTrainer asks for Gemma's image processor, which is not there; ours loads the tokenizer by itself
    args = DPOConfig(str(tmp_path), **common)
    theirs, expected_loss = DPOTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer), None
    for trainer_class, config_class, options in METHODS:
        ours = trainer_class(model, args=config_class(str(tmp_path), **common, **options), train_dataset=dataset)
        left = token_ids(ours)
        kept = [i for i, row in enumerate(token_ids(theirs)) if row in left]
        # Left out are pairs that are equal as far as they are kept, which DPOTrainer trains on
        assert 0 < len(kept) == len(left) and (truncated or len(kept) == len(theirs.train_dataset))
        expected, found = batch_of(theirs, kept), batch_of(ours, range(len(kept)))
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=0)
        shortest = expected["attention_mask"].sum(dim=1).view(2, -1).sum(dim=0).argsort()[:2].tolist()
        if expected_loss is None:
            expected_loss = loss(theirs, [kept[i] for i in shortest])
            assert abs(expected_loss.item() - 0.6931) > 1e-4
        torch.testing.assert_close(loss(ours, shortest), expected_loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", CONVERTED)
def test_published_shapes(shape, tokenizer, tmp_path):
    """Oracle: TRL's rendering of the rows in its own form."""
    published, standard = CONVERTED[shape]
    args = DPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    dataset = Dataset.from_list(published, on_mixed_types="use_json")
    prepared, account = prepared_pairs(dataset, tokenizer, args, "train", len(tokenizer))
    assert {name: prepared[name][:] for name in TOKENS} == ids(standard, tokenizer, args)
    assert not account.findings.dropped


def test_what_the_templates_do_to_roles(tokenizer, name, tmp_path):
    """Two users in a row are refused by Gemma's; a role that nobody knows is dropped by Qwen3's, and has a header in Llama's."""
    args = DPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    good = SCENES["one turn"] * 2
    two_users = pair([user("One."), user("Two?")], "Three.", "Four.")
    narrator = pair([{"role": "narrator", "content": "Night."}, user("Two?")], "Three.", "Four.")
    found = {}
    for what, row in (("two users", two_users), ("narrator", narrator)):
        _, account = prepared_pairs(Dataset.from_list([*good, row]), tokenizer, args)
        found[what] = account.findings.first.get("role", (0, ""))[1].rpartition("; ")[2].partition(":")[0]
    assert (
        found
        == {
            "gemma3": {"two users": "the template refuses them", "narrator": "the template refuses them"},
            "qwen3": {"two users": "", "narrator": "the template drops `narrator`"},
            "llama3_1": {"two users": "", "narrator": ""},
        }[name]
    )


def test_text_with_the_template_s_own_tokens(tokenizer, tmp_path):
    rendered = [
        {
            "prompt": tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True),
            "chosen": row["chosen"][0]["content"],
            "rejected": row["rejected"][0]["content"],
        }
        for row in SCENES["one turn"]
    ]
    args = DPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    _, account = prepared_pairs(Dataset.from_list(rendered), tokenizer, args)
    assert account.findings.warned["rendered"] == 1
