"""
What only Sr-DPO does: prompts with the refinement prompt, and responses behind them that are computed from shared key-value caches. The
oracle sees them as whole sequences, put together from the collated batch (`augmented_sequences`).
"""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tests.conftest import CHAT_TEMPLATE, FullLogits, first_batch, perturb, step_metrics, train_step
from tests.rows.test_pairs import ids
from tests.trainers.methods import LN_2, Method, Paper, augmented_sequences, response_logps
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer
from trl import DPOConfig, DPOTrainer

from trl_ext import SelfRefineDPOConfig, SelfRefineDPOTrainer
from trl_ext.trainers.self_refine_dpo_trainer import DataCollatorForSelfRefinement, augment_prompt


# PAPERS.md §2
PAPERS_PROMPT = (
    "Please generate a response with a usefulness rating of 100 out of 100 for the following query. Note that the "
    "response should be harmless. The term 100 indicates the level of usefulness, where 100 is the maximum and 1 is the "
    "minimum. Query:"
)
FULL_WEIGHT = Method(SelfRefineDPOTrainer, SelfRefineDPOConfig, {"refinement_weight": 1.0})


class WholeSequenceTrainer(SelfRefineDPOTrainer):
    """Computes each augmented sequence by itself, as for models that cannot continue a shared cache."""

    _caches_prompts = False


def is_sublist(part: list[int], whole: list[int]) -> bool:
    return any(whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1))


@pytest.mark.parametrize(("refinement_weight", "head"), [(0.3, "completion_log_probs"), (0.0, "fused_lm_head")])
def test_which_head_is_asked(make_trainer, refinement_weight, head):
    """The plain forward of the policy asks this package's head, but for lambda 0, whose every bit is TRL's."""
    trainer = make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, refinement_weight=refinement_weight)
    flags = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: flags.append({name for name, value in kwargs.items() if value is True}),
        with_kwargs=True,
    )
    train_step(trainer, first_batch(trainer))
    assert flags == [{"completion_log_probs"}, {head}]  # under the augmented prompt, and the plain one


def test_empty_refinement_prompt_is_dpo_with_a_smaller_beta(make_trainer):
    """Limit (eq. 10): with p empty, Delta is DPO's own margin, so Sr-DPO's value is DPO's at beta (1 - lambda)."""
    ours = make_trainer(
        SelfRefineDPOTrainer, SelfRefineDPOConfig, refinement_prompt="", beta=0.5, refinement_weight=0.3
    )
    stock = make_trainer(DPOTrainer, DPOConfig, beta=0.5 * (1 - 0.3))
    losses = []
    for trainer in (ours, stock):
        perturb(trainer.model)
        losses.append(train_step(trainer, first_batch(trainer)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert step_metrics(ours)["refinement/share"] == pytest.approx(0.3, rel=1e-5)  # lambda |u| / |u|


# The augmented prompt


def check_augmented_batch(trainer, batch: dict, inserted: str) -> None:
    """The same completion tokens after both prompts; the augmented prompt is the plain one with `inserted` put in."""
    inserted_ids = trainer.processing_class(inserted, add_special_tokens=False)["input_ids"]
    sequences = augmented_sequences(batch)
    for row in range(len(batch["input_ids"])):
        (plain, completion), (augmented, augmented_completion) = (split(x, row) for x in (batch, sequences))
        assert len(completion) > 0
        assert augmented_completion == completion
        assert is_sublist(inserted_ids, augmented)
        start = next(i for i in range(len(augmented)) if augmented[i : i + len(inserted_ids)] == inserted_ids)
        assert augmented[:start] + augmented[start + len(inserted_ids) :] == plain


def split(batch: dict, row: int) -> tuple[list[int], list[int]]:
    """A row's prompt and completion, without padding."""
    ids, attention_mask, completion_mask = (
        batch[name][row] for name in ("input_ids", "attention_mask", "completion_mask")
    )
    prompt = attention_mask.bool() & ~completion_mask.bool()
    return ids[prompt].tolist(), ids[completion_mask.bool()].tolist()


def augmented_text(trainer, batch: dict) -> str:
    """The first row's augmented sequence."""
    return trainer.processing_class.decode(augmented_sequences(batch)["input_ids"][0])


def test_default_prompt_is_the_papers(tmp_path):
    config = SelfRefineDPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert config.refinement_prompt == PAPERS_PROMPT


@pytest.mark.parametrize("max_length", [1024, 20, 12, 10], ids=str)
def test_augmented_prompt_of_messages(make_trainer, max_length):
    """`p + x` in the first user message. Truncation follows the plain sample, so both keep the same completion."""
    trainer = make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, max_length=max_length)
    batch = first_batch(trainer)
    assert batch["input_ids"].size(1) <= max_length
    assert (batch["input_ids"].size(1) == max_length) == (max_length < 1024)
    check_augmented_batch(trainer, batch, PAPERS_PROMPT)


@pytest.mark.parametrize("max_length", [1024, 9], ids=str)
def test_augmented_prompt_of_plain_text(make_trainer, plain_text_pairs, max_length):
    trainer = make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, dataset=plain_text_pairs, max_length=max_length)
    batch = first_batch(trainer)
    check_augmented_batch(trainer, batch, PAPERS_PROMPT)
    assert augmented_text(trainer, batch).startswith("Please generate")


@pytest.mark.parametrize("data", ["messages", "text"])
def test_empty_refinement_prompt(make_trainer, conversational_pairs, plain_text_pairs, data):
    """With p empty the augmented sequences are the plain ones, and Delta is DPO's margin."""
    trainer = make_trainer(
        SelfRefineDPOTrainer,
        SelfRefineDPOConfig,
        dataset=conversational_pairs if data == "messages" else plain_text_pairs,
        refinement_prompt="",
    )
    batch = first_batch(trainer)
    sequences = augmented_sequences(batch)
    assert all(torch.equal(sequences[name], batch[name]) for name in sequences)
    perturb(trainer.model)
    train_step(trainer, batch)
    metrics = step_metrics(trainer)
    assert metrics["refinement/margin"] == pytest.approx(metrics["rewards/margins"], rel=1e-5)


def test_augmented_prompt_of_an_implicit_prompt(make_trainer, conversational_pairs):
    """A dataset without a `prompt` column: TRL extracts the common start, and p goes into its first user message."""
    dataset = conversational_pairs.map(
        lambda row: {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]},
        remove_columns="prompt",
    )
    trainer = make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, dataset=dataset)
    check_augmented_batch(trainer, first_batch(trainer), PAPERS_PROMPT)


def test_augmented_prompt_in_the_first_of_several_turns(make_trainer):
    messages = [
        {"role": "system", "content": "You are brief"},
        {"role": "user", "content": "what runs ?"},
        {"role": "assistant", "content": "the cat"},
        {"role": "user", "content": "why ?"},
    ]
    dataset = Dataset.from_list(
        [
            {
                "prompt": messages,
                "chosen": [{"role": "assistant", "content": "because"}],
                "rejected": [{"role": "assistant", "content": "no"}],
            }
        ]
        * 4
    )
    trainer = make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, dataset=dataset, refinement_prompt="Be useful .")
    batch = first_batch(trainer)
    check_augmented_batch(trainer, batch, "Be useful .")
    start = "<system> You are brief </s> <user> Be useful . what runs ? </s> <assistant> the cat </s>"
    assert augmented_text(trainer, batch).startswith(start)


@pytest.mark.parametrize("with_system", [False, True], ids=["", "with-system"])
def test_augmented_prompt_as_the_system_message(make_trainer, conversational_pairs, with_system):
    """`refinement_prompt_role="system"`: p goes before the system message, or becomes it."""
    system = [{"role": "system", "content": "You are brief"}] if with_system else []
    dataset = conversational_pairs.map(lambda row: {"prompt": system + row["prompt"]})
    trainer = make_trainer(
        SelfRefineDPOTrainer,
        SelfRefineDPOConfig,
        dataset=dataset,
        refinement_prompt="Be useful .",
        refinement_prompt_role="system",
        max_length=16,
    )
    batch = first_batch(trainer)
    inserted = "Be useful ." if with_system else "<system> Be useful . </s>"
    check_augmented_batch(trainer, batch, inserted)
    start = "<system> Be useful . You are brief </s> <user>" if with_system else "<system> Be useful . </s> <user>"
    assert augmented_text(trainer, batch).startswith(start)


@pytest.mark.parametrize("as_json", [False, True], ids=["list", "json"])
def test_augmented_prompt_with_tools(make_trainer, conversational_pairs, as_json):
    """Tools are rendered into both prompts; like TRL, from a list or from its JSON text."""
    tools = [{"type": "function", "function": {"name": "light"}}]
    rows = [row | {"tools": json.dumps(tools) if as_json else tools} for row in conversational_pairs]
    trainer = make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, dataset=Dataset.from_list(rows))
    batch = first_batch(trainer)
    assert trainer.processing_class.decode(batch["input_ids"][0]).startswith("<tool> light <user> what")
    check_augmented_batch(trainer, batch, PAPERS_PROMPT)


MESSAGES = "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} </s> {% endfor %}"
WITHOUT_SYSTEM = "{% if messages[0]['role'] != 'system' %}"
# Chat templates that render more than the messages
TEMPLATES = {
    "default-system": WITHOUT_SYSTEM + "<system> You are brief </s> {% endif %}" + CHAT_TEMPLATE,
    # A thought before each answer, unless the system message says how to answer; the same before and in a response
    "thoughts": (
        "{% for message in messages %}<{{ message['role'] }}> "
        "{% if message['role'] == 'assistant' %}" + WITHOUT_SYSTEM + "long {% endif %}{% endif %}"
        "{{ message['content'] }} </s> {% endfor %}"
        "{% if add_generation_prompt %}<assistant> " + WITHOUT_SYSTEM + "long {% endif %}{% endif %}"
    ),
    # In the prompt only, so that DPOTrainer leaves it out
    "prompt-only": MESSAGES + "{% if add_generation_prompt %}<assistant> long {% endif %}",
    "prompt-only-without-system": (
        MESSAGES + "{% if add_generation_prompt %}<assistant> " + WITHOUT_SYSTEM + "long {% endif %}{% endif %}"
    ),
    "prompt-only-with-system": (
        MESSAGES + "{% if add_generation_prompt %}<assistant> "
        "{% if messages[0]['role'] == 'system' %}long {% endif %}{% endif %}"
    ),
}


@pytest.mark.parametrize("role", ["user", "system"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_augmented_prompt_under_other_templates(make_trainer, conversational_pairs, template, role):
    """
    Oracle: `DPOTrainer` on a dataset whose prompts are augmented. Its prompt tokens are ours; the completion tokens are
    those of the plain prompts.
    """
    rows = [row | {"chat_template_kwargs": {"chat_template": TEMPLATES[template]}} for row in conversational_pairs]
    ours = make_trainer(
        SelfRefineDPOTrainer,
        SelfRefineDPOConfig,
        dataset=Dataset.from_list(rows),
        refinement_prompt="Be useful .",
        refinement_prompt_role=role,
    )
    augmented = [row | {"prompt": augment_prompt(row["prompt"], "Be useful .", role)} for row in rows]
    plain, stock = (ids(data, ours.processing_class, ours.args) for data in (rows, augmented))
    assert ours.train_dataset["augmented_prompt_ids"][:] == stock["prompt_ids"]
    assert {name: ours.train_dataset[name][:] for name in plain} == plain
    batch = first_batch(ours)
    sequences = augmented_sequences(batch)
    for row in range(8):
        assert split(sequences, row)[1] == split(batch, row)[1]


@pytest.mark.parametrize(("role", "content"), [("user", [{"type": "text", "text": "why ?"}]), ("assistant", "no")])
def test_prompt_without_a_user_text_is_refused(role, content):
    with pytest.raises(ValueError, match="refinement prompt"):
        augment_prompt([{"role": role, "content": content}], "Be useful .")


def test_augment_prompt_leaves_the_rows_as_they_are():
    messages = [{"role": "user", "content": "why ?"}]
    assert augment_prompt(messages, "Be useful .")[0]["content"] == "Be useful . why ?"
    assert messages == [{"role": "user", "content": "why ?"}]


def test_streaming_dataset(make_trainer, conversational_pairs):
    """An `IterableDataset` gives the batches of the same rows in memory."""
    in_memory = make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig)
    streaming = make_trainer(
        SelfRefineDPOTrainer, SelfRefineDPOConfig, dataset=conversational_pairs.to_iterable_dataset(), max_steps=1
    )
    rows = list(streaming.train_dataset)
    assert [row["augmented_prompt_ids"] for row in rows] == in_memory.train_dataset["augmented_prompt_ids"][:]
    streaming.train()
    assert streaming.state.log_history[0]["loss"] == LN_2


@pytest.mark.parametrize("truncation_mode", ["keep_start", "keep_end"])
@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
def test_rows_with_more_tokens_than_positions(make_trainer, tiny_model_dir, caplog, truncation_mode):
    """Lengths as the collator makes them. The tiny Llama has 256 positions, the other as many as the shortest row needs."""

    def make(model=None):
        options = {"max_length": 12, "truncation_mode": truncation_mode}
        return make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, model=model, **options)

    trainer, lengths = make(), []
    for row in trainer.train_dataset:
        answers = trainer.data_collator([row])["completion_attention_mask"].sum(dim=1)
        lengths.append(len(row["augmented_prompt_ids"]) + answers.max().item())
    assert "positions" not in caplog.text
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    model.config.max_position_embeddings = min(lengths)
    make(model)
    rows = sum(length > min(lengths) for length in lengths)
    assert rows > 0 and f"{rows} of 8 rows of the train dataset have up to {max(lengths)} tokens with" in caplog.text


def test_system_role_needs_messages(make_trainer, plain_text_pairs):
    with pytest.raises(ValueError, match="refinement_prompt_role"):
        make_trainer(
            SelfRefineDPOTrainer, SelfRefineDPOConfig, dataset=plain_text_pairs, refinement_prompt_role="system"
        )


def test_collator_without_the_augmented_prompt_is_refused(make_trainer):
    """TRL's own collator would drop `augmented_prompt_ids`, and with it Delta: an error, not DPO."""
    trainer = make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig)
    batch = {key: value for key, value in first_batch(trainer).items() if not key.startswith("augmented_")}
    with pytest.raises(ValueError, match="augmented_"):
        train_step(trainer, batch)


# Shared prompts


WINDOW = {"sliding_window": 8, "head_dim": 8}  # shorter than each augmented prompt
# Type and options of a tiny model, and whether chosen and rejected share the computation of their prompt
ARCHITECTURES = {
    "llama": ("llama", {}, True),
    "qwen3": ("qwen3", {"head_dim": 8}, True),
    "mistral-window": ("mistral", WINDOW, True),
    "gemma2": ("gemma2", {**WINDOW, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0}, True),
    "gemma3": (
        "gemma3_text",
        {**WINDOW, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
        True,
    ),
    "gpt2": ("gpt2", {"n_positions": 256}, True),
    "gpt-neox": ("gpt_neox", {}, True),
    "mixtral": ("mixtral", {"num_local_experts": 4}, True),
    "falcon-alibi": ("falcon", {"alibi": True, "multi_query": True}, True),  # its positions are made from the mask
    # Windows that its own attention counts in the cache's slots, padding included
    "gpt-neo": ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 8}, None),
    "bloom": ("bloom", {"n_head": 4, "n_layer": 2}, False),  # no `position_ids`
    "mamba": ("mamba", {"state_size": 4}, False),
    "falcon-h1": (
        "falcon_h1",
        {f"mamba_{name}": size for name, size in {"d_ssm": 32, "n_heads": 4, "d_head": 8, "d_state": 8}.items()}
        | {"mamba_n_groups": 1, "mamba_chunk_size": 16},
        False,
    ),
    # Its convolutions keep a state, though transformers does not call it stateful
    "lfm2": (
        "lfm2",
        {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64, "block_auto_adjust_ff_dim": False},
        False,
    ),
}


@pytest.fixture
def make_tiny(make_model_dir):
    """Returns a function that saves one of ARCHITECTURES and returns its directory."""

    def make(architecture: str) -> str:
        model_type, options, _ = ARCHITECTURES[architecture]
        return make_model_dir(model_type, **options)

    return make


@torch.no_grad()
def augmented_logps(trainer, batch: dict) -> torch.Tensor:
    """The trainer's log-probabilities of the responses under the augmented prompts, `(2B,)`."""
    return torch.cat(trainer._augmented_logps(trainer.model, batch))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cached_prompts_match_whole_sequences(make_trainer, make_tiny, architecture):
    """
    Oracle: float64 full logits of whole sequences, for the log-probabilities under the augmented prompts, one by one, and
    for the loss. So does a trainer that computes each sequence by itself.
    """
    path = make_tiny(architecture)
    trainers = [
        make_trainer(cls, SelfRefineDPOConfig, model=str(path), refinement_weight=1.0, router_aux_loss_coef=0.0)
        for cls in (SelfRefineDPOTrainer, WholeSequenceTrainer)
    ]
    shares = ARCHITECTURES[architecture][2]
    assert shares in (None, trainers[0]._caches_prompts)
    perturb(trainers[0].model)
    policy, ref = FullLogits(path, trainers[0].model.state_dict()), FullLogits(path)
    batch = first_batch(trainers[0])
    assert batch["augmented_prefix_ids"].size(1) > 8
    assert not batch["augmented_prompt_mask"].all()  # the prompts are of uneven lengths
    with torch.no_grad():
        expected = response_logps(policy, augmented_sequences(batch)).flatten().float()
        expected_loss = Paper(FULL_WEIGHT, policy, ref, batch).loss()
        assert abs(expected_loss - Paper(Method(DPOTrainer, DPOConfig), policy, ref, batch).loss()) > 1e-4

    for trainer in trainers[: 2 if shares is not False else 1]:
        trainer.model.load_state_dict(trainers[0].model.state_dict())
        torch.testing.assert_close(augmented_logps(trainer, batch), expected, atol=1e-4, rtol=1e-5)
        assert train_step(trainer, batch).item() == pytest.approx(expected_loss.item(), rel=1e-5)


def test_fallback_is_not_the_shared_path(make_trainer):
    """`WholeSequenceTrainer` computes whole sequences, so the comparison above is not of one thing with itself."""
    calls = {}
    for trainer_class in (SelfRefineDPOTrainer, WholeSequenceTrainer):
        trainer = make_trainer(trainer_class, SelfRefineDPOConfig)
        batch = first_batch(trainer)
        calls[trainer_class] = embedded_shapes(
            trainer, lambda trainer=trainer, batch=batch: augmented_logps(trainer, batch)
        )
    longest = augmented_sequences(batch)["input_ids"].size(1)
    assert len(calls[SelfRefineDPOTrainer]) == 3
    ((rows, length),) = calls[WholeSequenceTrainer]
    assert (rows, length >= longest) == (8, True)


def embedded_shapes(trainer, step) -> list[tuple[int, int]]:
    """The shapes of the ids that the policy embeds during `step()`."""
    shapes = []
    embedding = trainer.model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape)))
    step()
    handle.remove()
    return shapes


# Prompts, and the lengths of chosen and rejected: what a batch can look like
LAYOUTS = {
    "uneven": ([[7, 8, 9, 10], [7, 8, 11], [7, 8, 9, 12, 13, 14, 15, 16, 17]], [(3, 5), (2, 1), (4, 12)]),
    "one-pair": ([[7, 8, 9, 10, 11]], [(3, 4)]),
    "nothing-in-common": ([[7, 8], [9, 10, 11], [12]], [(3, 1), (2, 2), (1, 4)]),
    "the-same-prompt": ([[7, 8, 9, 10]] * 3, [(3, 1), (2, 2), (1, 4)]),
    "a-prompt-in-a-prompt": ([[7, 8, 9], [7, 8, 9, 10, 11]], [(3, 1), (2, 2)]),
    "one-token-responses": ([[7, 8, 9, 10], [7, 11]], [(1, 1), (1, 1)]),
    "prompts-of-one-token": ([[7], [7]], [(2, 1), (1, 3)]),
}


@pytest.mark.parametrize("pad_to_multiple_of", [None, 8], ids=["", "multiples-of-8"])
@pytest.mark.parametrize("architecture", ["llama", "mistral-window", "gpt2"])
def test_shapes_of_a_batch(make_trainer, make_tiny, architecture, pad_to_multiple_of):
    """
    Oracle: float64 full logits of whole sequences. And each augmented prompt is computed once: in a batch of B pairs, L
    tokens in common once, B times the rest and 2B times the responses but for their last token; with a window B times the
    whole prompts.
    """
    path = make_tiny(architecture)
    trainer = make_trainer(
        SelfRefineDPOTrainer, SelfRefineDPOConfig, model=str(path), pad_to_multiple_of=pad_to_multiple_of
    )
    policy = FullLogits(path)
    generator = torch.Generator().manual_seed(0)
    for name, (prompts, lengths) in LAYOUTS.items():
        rows = []
        for prompt, (chosen, rejected) in zip(prompts, lengths, strict=True):
            responses = torch.randint(7, 60, (chosen + rejected,), generator=generator).tolist()
            rows.append(
                {
                    "prompt_ids": [5, 6],
                    "augmented_prompt_ids": prompt,
                    "chosen_ids": responses[:chosen],
                    "rejected_ids": responses[chosen:],
                }
            )
        batch = trainer.data_collator(rows)
        sequences = augmented_sequences(batch)
        for i, row in enumerate(rows):
            for j, side in ((i, "chosen_ids"), (i + len(rows), "rejected_ids")):
                ids = sequences["input_ids"][j][sequences["attention_mask"][j].bool()].tolist()
                assert ids == row["augmented_prompt_ids"] + row[side], name

        actual = []
        shapes = embedded_shapes(
            trainer, lambda batch=batch, actual=actual: actual.append(augmented_logps(trainer, batch))
        )
        with torch.no_grad():
            torch.testing.assert_close(
                actual[0].double(),
                response_logps(policy, sequences).flatten(),
                atol=1e-4,
                rtol=1e-5,
                msg=f"{name}: {{}}".format,
            )
        pairs, length = batch["augmented_prompt_ids"].shape
        prefix, responses = batch["augmented_prefix_ids"].size(1), batch["completion_ids"].size(1)
        expected = [(1, prefix), (pairs, length), (2 * pairs, responses - 1)]
        if architecture == "mistral-window":
            expected[:2] = [(pairs, prefix + length)]
        assert shapes == [shape for shape in expected if shape[1] > 0], name


def test_positions_of_a_step(make_trainer):
    """
    One step of eight pairs embeds the plain sequences, as DPO does, and of the augmented ones the common start once, each
    prompt's rest once and each response once: less than a third of what whole sequences would be.
    """
    trainer = make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, per_device_train_batch_size=8)
    batch = first_batch(trainer)
    shapes = embedded_shapes(trainer, lambda: train_step(trainer, batch))
    plain = tuple(batch["input_ids"].shape)
    assert sorted(shapes)[-1] == plain
    shapes.remove(plain)
    augmented = sum(rows * length for rows, length in shapes)
    assert augmented < augmented_sequences(batch)["input_ids"].numel() / 3


def test_collator_by_hand():
    """Two pairs, by hand: the common start once, prompts padded on the left, responses cut at the same length as the plain ones."""
    rows = [
        {
            "prompt_ids": [1, 2],
            "augmented_prompt_ids": [9, 9, 1, 2],
            "chosen_ids": [3, 4, 5],
            "rejected_ids": [6],
            "ref_chosen_logps": -1.0,
            "ref_rejected_logps": -2.0,
            "ref_augmented_chosen_logps": -3.0,
            "ref_augmented_rejected_logps": -4.0,
        },
        {
            "prompt_ids": [7],
            "augmented_prompt_ids": [9, 9, 7],
            "chosen_ids": [8],
            "rejected_ids": [3, 3],
            "ref_chosen_logps": -5.0,
            "ref_rejected_logps": -6.0,
            "ref_augmented_chosen_logps": -7.0,
            "ref_augmented_rejected_logps": -8.0,
        },
    ]
    batch = DataCollatorForSelfRefinement(pad_token_id=0, max_length=4)(rows)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 2, 3, 4], [7, 8, 0, 0], [1, 2, 6, 0], [7, 3, 3, 0]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]],
        "completion_mask": [[0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 1, 0]],
        "ref_chosen_logps": [-1.0, -5.0],
        "ref_rejected_logps": [-2.0, -6.0],
        "augmented_prefix_ids": [[9, 9]],
        "augmented_prompt_ids": [[1, 2], [0, 7]],
        "augmented_prompt_mask": [[1, 1], [0, 1]],
        "completion_ids": [[3, 4], [8, 0], [6, 0], [3, 3]],
        "completion_attention_mask": [[1, 1], [1, 0], [1, 0], [1, 1]],
        "ref_augmented_chosen_logps": [-3.0, -7.0],
        "ref_augmented_rejected_logps": [-4.0, -8.0],
    }


# No gradient through the augmented forward, and no trace of it


@pytest.mark.parametrize(
    "checkpointing",
    [None, {"use_reentrant": False}, {"use_reentrant": True}],
    ids=["", "checkpointing", "reentrant"],
)
@pytest.mark.parametrize("trainer_class", [SelfRefineDPOTrainer, WholeSequenceTrainer], ids=["shared", "whole"])
def test_no_gradient_through_the_augmented_forward(make_trainer, trainer_class, checkpointing):
    """
    The words that only the refinement prompt has are seen by the augmented forward alone: their embeddings move Delta and
    get a gradient of exactly 0. And nothing of that forward is kept for a backward.
    """
    trainer = make_trainer(
        trainer_class,
        SelfRefineDPOConfig,
        refinement_weight=1.0,
        gradient_checkpointing=checkpointing is not None,
        gradient_checkpointing_kwargs=checkpointing,
    )
    perturb(trainer.model)
    batch = first_batch(trainer)
    embedding = trainer.model.get_input_embeddings()
    plain = set(batch["input_ids"].unique().tolist())
    probe = sorted(set(augmented_sequences(batch)["input_ids"].unique().tolist()) - plain)
    assert trainer.processing_class.convert_tokens_to_ids("usefulness") in probe

    graphs = []
    handle = embedding.register_forward_hook(
        lambda module, args, output: graphs.append((set(args[0].unique().tolist()) <= plain, output.requires_grad))
    )
    loss = train_step(trainer, batch)
    handle.remove()
    assert all(has_graph == (args_are_plain and has_graph) for args_are_plain, has_graph in graphs)
    assert sum(has_graph for _, has_graph in graphs) == 1  # the plain forward
    assert not embedding.weight.grad[probe].any()
    assert embedding.weight.grad.any()
    assert not any(x.requires_grad for x in trainer._augmented_logratios)

    embedding.weight.data[probe] += 0.5
    assert abs(train_step(trainer, batch).item() - loss.item()) > 1e-3


@pytest.mark.parametrize("trainer_class", [SelfRefineDPOTrainer, WholeSequenceTrainer], ids=["shared", "whole"])
@pytest.mark.parametrize("variant", [None, "tdpo2"])
def test_a_step_leaves_the_model_as_it_was(make_trainer, variant, trainer_class):
    """Training mode, dropout, checkpointing, the active adapter and what is trained: the same before and after a step."""
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.1)
    trainer = make_trainer(
        trainer_class,
        SelfRefineDPOConfig,
        variant=variant,
        gradient_checkpointing=True,
        disable_dropout=False,
        trainer={"peft_config": peft_config},
    )

    def state():
        model = trainer.model
        modules = list(model.named_modules())
        return {
            "training": {name: module.training for name, module in modules},
            "dropout": {name: module.p for name, module in modules if isinstance(module, torch.nn.Dropout)},
            "checkpointing": {
                name: module.gradient_checkpointing
                for name, module in modules
                if isinstance(module, GradientCheckpointingLayer)
            },
            "active": model.active_adapters,
            "disabled": [module.disable_adapters for _, module in modules if "_disable_adapters" in vars(module)],
            "trained": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        }

    batch = first_batch(trainer)
    trainer.model.train()
    trainer.model.gradient_checkpointing_enable()
    before = state()
    assert 0.1 in before["dropout"].values()
    assert len(before["checkpointing"]) == 2
    assert all(before["checkpointing"].values())
    assert all(before["training"].values())
    assert before["trained"]
    trainer.compute_loss(trainer.model, batch).backward()
    assert state() == before
    assert trainer.model.is_gradient_checkpointing
    assert all(p.grad is not None for p in trainer.model.parameters() if p.requires_grad)
