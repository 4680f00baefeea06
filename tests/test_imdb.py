"""
The path of TDPO's IMDb study, from reviews to the frontier's table, on a tiny random GPT-2 and a tiny random classifier: the scripts of
`recipes/imdb` and the two recipes of `recipes/gpt2-large`, with the overrides that a machine without a GPU needs.

Oracles: the reviews' own tokens; the classifier called text by text; KL and entropy from the logits of each text alone, in float64.
"""

import csv
import itertools
import json
import math
import random
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from trl.scripts import sft

from trl_ext.scripts import tdpo


ROOT = Path(__file__).parents[1]
EOS = "<|endoftext|>"
NEW_TOKENS = 12
ON_CPU = ["--use_cpu", "--bf16", "false", "--max_steps", "2", "--per_device_train_batch_size", "4"]


def reviews(count: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    opinions = ("wonderful", "dreadful", "overlong", "lovely", "unconvincing", "charming")
    return [
        " ".join(
            f"The {generator.choice(('film', 'plot', 'acting'))} was {generator.choice(opinions)}.<br />"
            for _ in range(4)
        )
        for _ in range(count)
    ]


def save_tokenizer(path: Path, texts: list[str], **special: str) -> int:
    """A byte-level BPE, as GPT-2's and RoBERTa's are."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=list(special.values()), initial_alphabet=alphabet, show_progress=False
        ),
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    return tokenizer.get_vocab_size()


@pytest.fixture(scope="module")
def scripts():
    """The scripts of `recipes/imdb`, imported as one of them imports another, with short continuations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "recipes" / "imdb"))
        found = {name: import_module(name) for name in ("prepare", "sentiment", "pairs", "frontier")}
        patch.setattr(found["pairs"], "NEW_TOKENS", NEW_TOKENS)
        yield found


@pytest.fixture(scope="module")
def study(tmp_path_factory, scripts, single_thread) -> Path:
    """A directory in which the whole path was run, as docs/evidence/at_size.md has it."""
    path = tmp_path_factory.mktemp("imdb")
    texts = {"train": reviews(24, seed=0), "test": reviews(8, seed=1)}
    (path / "imdb").mkdir()
    for split, found in texts.items():
        rows = (json.dumps({"text": text, "label": i % 2}) + "\n" for i, text in enumerate(found))
        (path / "imdb" / f"{split}.jsonl").write_text("".join(rows))
    torch.manual_seed(0)
    gpt2, classifier = path / "gpt2", path / "classifier"
    size = save_tokenizer(gpt2, texts["train"], eos_token=EOS)
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=size,
            n_positions=256,
            n_embd=64,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
            initializer_range=0.2,
        )
    ).save_pretrained(gpt2)
    size = save_tokenizer(classifier, texts["train"], pad_token="<pad>", eos_token=EOS)
    RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=size,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=256,
            pad_token_id=0,
            initializer_range=0.5,
            id2label={0: "NEGATIVE", 1: "POSITIVE"},
            label2id={"NEGATIVE": 0, "POSITIVE": 1},
        )
    ).save_pretrained(classifier)

    config = ROOT / "recipes" / "gpt2-large"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setenv("IMDB_CLASSIFIER", str(classifier))
        patch.setenv("HF_HOME", str(path / "hf"))
        scripts["prepare"].main(
            ["--dataset", "imdb", "--tokenizer", "gpt2", "--train", "12", "--test", "6", "--output", "prompts"]
        )
        args = ["--config", str(config / "sft" / "config_imdb.yaml"), "--model_name_or_path", "gpt2"]
        args += ["--dataset_name", "imdb", "--max_length", "128", "--output_dir", "sft", *ON_CPU]
        sft.main(*sft.make_parser().parse_args_and_config(args))
        scripts["pairs"].main(["--model", "sft", "--prompts", "prompts", "--output", "pairs"])
        for run, options in {"tdpo2": [], "tdpo1": ["--variant", "tdpo1"], "dpo": ["--alpha", "0"]}.items():
            tdpo.run(
                [
                    *("--config", str(config / "tdpo" / "config_imdb.yaml"), "--model_name_or_path", "sft", *ON_CPU),
                    *("--dataset_name", "pairs", "--output_dir", run, "--save_steps", "1", "--eval_steps", "1"),
                    *("--logging_steps", "1", "--warmup_steps", "0", "--learning_rate", "1.0e-3", *options),
                ]
            )
        scripts["frontier"].main(
            ["--reference", "sft", "--prompts", "prompts", "--output", "frontier.csv", "tdpo2", "tdpo1", "dpo"]
        )
    return path


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prompts_are_the_first_two_to_eight_tokens(study):
    tokenizer = AutoTokenizer.from_pretrained(study / "gpt2")
    for split, count in (("train", 12), ("test", 6)):
        begin = [tokenizer(row["text"])["input_ids"] for row in rows_of(study / "imdb" / f"{split}.jsonl")]
        prompts = [row["prompt"] for row in rows_of(study / "prompts" / f"{split}.jsonl")]
        assert len(prompts) == count
        for prompt in prompts:
            assert prompt in {tokenizer.decode(ids[:n]) for ids in begin for n in range(2, 9)}


def test_pairs_are_of_one_prompt_and_labelled_by_the_classifier(study):
    """Oracle: the classifier's own softmax, one text at a time."""
    tokenizer = AutoTokenizer.from_pretrained(study / "classifier")
    model = AutoModelForSequenceClassification.from_pretrained(study / "classifier").eval()

    def score(text: str) -> float:
        with torch.no_grad():
            return model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0, 1].item()

    for split in ("train", "test"):
        prompts = Counter(row["prompt"] for row in rows_of(study / "prompts" / f"{split}.jsonl"))
        pairs = rows_of(study / "pairs" / f"{split}.jsonl")
        for prompt, count in Counter(pair["prompt"] for pair in pairs).items():
            assert count <= 6 * prompts[prompt]
        assert len(pairs) > 3 * prompts.total()  # most of the six
        for pair in pairs:
            chosen, rejected = (score(pair["prompt"] + pair[side]) for side in ("chosen", "rejected"))
            assert chosen > rejected
            assert (pair["chosen_score"], pair["rejected_score"]) == pytest.approx((chosen, rejected), abs=1e-5)
    assert len({pair["chosen_score"] for pair in pairs}) > 1


def test_the_same_two_texts_and_two_equal_scores_are_no_pair(scripts):
    dropped = Counter()
    rows = scripts["pairs"].make_pairs("I", [" a", " a", " b", " c"], [0.1, 0.1, 0.9, 0.9], dropped)
    assert dropped == {"identical_answers": 1, "no_margin": 1}
    assert [(row["chosen"], row["rejected"]) for row in rows] == [(" b", " a"), (" c", " a")] * 2


def test_a_continuation_that_changes_the_prompts_tokens_is_seen(scripts, study):
    tokenizer = AutoTokenizer.from_pretrained(study / "gpt2")
    [merged, *_] = (word for word in ("The", " film", " was") if len(tokenizer(word)["input_ids"]) == 1)
    assert not scripts["pairs"].continues(tokenizer, merged[:-1], merged[-1])
    assert scripts["pairs"].continues(tokenizer, merged, "\n")


def test_tables_rows(study):
    with open(study / "frontier.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["step"]) for row in rows] == [
        ("sft", "0"),
        *itertools.product(("tdpo2", "tdpo1", "dpo"), ("1", "2")),
    ]
    assert float(rows[0]["kl"]) == 0
    for row in rows:
        assert 0 < float(row["reward"]) < 1 and 0 < float(row["entropy"]) < math.log(300)
    for row in rows[1:]:
        assert float(row["kl"]) > 0 and float(row["seq_kl_chosen"]) > 0 and 0 <= float(row["accuracy"]) <= 1
    # Seeds, pairs and their order are the same; what differs is the loss
    assert len({row["kl"] for row in rows if row["step"] == "2"}) == 3


def test_kl_and_entropy_of_a_batch(scripts, study, monkeypatch):
    """Oracle: each text alone, without padding, position by position in float64."""
    monkeypatch.setenv("IMDB_CLASSIFIER", str(study / "classifier"))
    load, sample = scripts["pairs"].load_policy, scripts["pairs"].sample
    (policy, tokenizer), (reference, _) = (load(str(study / name)) for name in ("dpo/checkpoint-2", "sft"))
    prompts = [row["prompt"] for row in rows_of(study / "prompts" / "test.jsonl")]
    torch.manual_seed(5)
    measured = scripts["frontier"].measure(policy, reference, tokenizer, prompts)
    torch.manual_seed(5)
    _, ids, mask = sample(policy, tokenizer, prompts)
    kl = entropy = 0.0
    for prompt, row, keep in zip(prompts, ids, mask, strict=True):
        begin = tokenizer(prompt)["input_ids"]
        answer = row[-mask.size(1) :][keep].tolist()
        with torch.no_grad():
            log_p, log_q = (
                model(torch.tensor([begin + answer])).logits[0, len(begin) - 1 : -1].double().log_softmax(-1)
                for model in (policy, reference)
            )
        kl += (log_p.exp() * (log_p - log_q)).sum().item()
        entropy -= (log_p.exp() * log_p).sum().item()
    assert measured["kl"] == pytest.approx(kl / len(prompts), rel=1e-3)
    assert measured["entropy"] == pytest.approx(entropy / mask.sum().item(), rel=1e-4)


def test_answers_end_at_the_first_eos(scripts, study):
    """A model whose every token is EOS says nothing; its EOS counts as a token, the padding behind it does not."""
    model, tokenizer = scripts["pairs"].load_policy(str(study / "sft"))
    model.lm_head = torch.nn.Linear(64, model.config.vocab_size)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias.data = torch.full((model.config.vocab_size,), -1e4).index_fill(
        0, torch.tensor(tokenizer.eos_token_id), 0.0
    )
    texts, _, mask = scripts["pairs"].sample(model, tokenizer, ["The film", "The plot was"], samples=2)
    assert texts == [""] * 4 and mask.sum(1).tolist() == [1] * 4
