"""
docs/evidence/real/tdpo_frontier.py at a size for a CPU: it runs from end to end on a model of this file, a second call runs nothing, and what it
measures agrees with a naive computation.
"""

import os
import random
import subprocess
import sys
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
from docs.evidence.real import film_reviews, runs, tdpo_frontier, tdpo_frontier_figure
from docs.evidence.real.distributions import sums_over_completions
from docs.evidence.tables import read
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from tests.aries.test_children import is_alive, wait_until_dead


POSITIVE, NEGATIVE = ("good", "great", "superb"), ("bad", "dull", "awful")


@pytest.fixture(scope="module")
def reviewer(tmp_path_factory):
    """A directory with a Gemma 3 of two layers that has learned to write reviews of one or two short sentences behind an opening."""
    path, generator = tmp_path_factory.mktemp("reviewer"), random.Random(0)
    openings = film_reviews.make_openings(400, seed=1)

    def review(opening: str) -> str:
        words = generator.choice((POSITIVE, NEGATIVE))
        return opening + "".join(f" was very {generator.choice(words)}." for _ in range(generator.randint(1, 2)))

    texts = [
        text
        for opening in openings
        for text in (review(opening), review(film_reviews.shown_reviews(opening, generator)))
    ]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<bos>"]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False))
    bpe.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        clean_up_tokenization_spaces=False,
    )
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        rows = [[*tokenizer(text)["input_ids"], 1] for text in generator.sample(texts, 32)]
        length = max(map(len, rows))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        loss = model(ids, attention_mask=(ids > 0).long(), labels=ids.masked_fill(ids == 0, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def lexicon(monkeypatch):
    """A stand-in for VADER with its interface: the share of positive among the words it knows, from -1 to 1."""

    class SentimentIntensityAnalyzer:
        def polarity_scores(self, text):
            words = [word.strip(".") for word in text.split()]
            good, bad = (sum(word in kind for word in words) for kind in (POSITIVE, NEGATIVE))
            return {"compound": (good - bad) / max(good + bad, 1)}

    module = SimpleNamespace(SentimentIntensityAnalyzer=SentimentIntensityAnalyzer)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", module)
    film_reviews.analyzer.cache_clear()
    yield
    film_reviews.analyzer.cache_clear()


class NoPool:
    """A pool that runs everything at once in this process, which has the stand-ins of this file."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, **kwargs) -> Future:
        future = Future()
        future.set_result(function(**kwargs))
        return future


def test_a_killed_experiment_leaves_no_run_behind(tmp_path):
    """The shell ends with the run that started it, and writes the run's process id first."""
    settings = [{"command": f"echo $PPID. > {tmp_path}/pid; while kill -0 $PPID; do sleep 0.1; done"}]
    code = f"import os, pathlib; from docs.evidence.real.runs import run_all; run_all(os.system, {settings!r}, pathlib.Path({str(tmp_path)!r}))"
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    experiment = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL)
    file = tmp_path / "pid"
    while not (file.exists() and file.read_text().endswith(".\n")):
        assert experiment.poll() is None
        time.sleep(0.05)
    run = int(float(file.read_text()))
    assert is_alive(run)
    experiment.kill()
    experiment.wait()
    assert wait_until_dead(run)


class TestFrontier:
    """docs/evidence/real/tdpo_frontier.py"""

    def test_sums_are_those_of_whole_distributions(self, reviewer):
        """In float64, from full logits and from the definitions; chunks of 5 positions and batches of 2 rows change nothing."""
        policy, reference = (film_reviews.load_model(reviewer).double() for _ in range(2))
        torch.manual_seed(0)
        for parameter in policy.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        generator = random.Random(0)
        prompts, completions = (
            [[generator.randrange(3, policy.config.vocab_size) for _ in range(n)] for n in lengths]
            for lengths in ((3, 7, 4), (6, 1, 9))
        )
        sums = sums_over_completions(policy, reference, prompts, completions, rows=2, positions=5)
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            with torch.no_grad():
                p, q = (
                    model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].softmax(-1)
                    for model in (policy, reference)
                )
            chosen = torch.tensor(completion).unsqueeze(-1)
            expected = {
                "kl": (p * (p / q).log()).sum(),
                "seq_kl": (q * (q / p).log()).sum(),
                "entropy": -(p * p.log()).sum(),
                "logps": p.gather(-1, chosen).log().sum(),
                "ref_logps": q.gather(-1, chosen).log().sum(),
            }
            assert sums.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(sums[name][i], value, rtol=1e-9, atol=1e-9)

    def test_reference_is_at_no_distance_from_itself(self, reviewer, lexicon):
        model, tokenizer = film_reviews.load_model(reviewer), film_reviews.load_tokenizer(reviewer)
        measured = film_reviews.measure(model, model, tokenizer, film_reviews.make_openings(8, seed=2), seed=0)
        assert measured["kl"] == 0
        assert measured["entropy"] > 0 and measured["finished"] > 0.5

    def test_pairs_are_what_the_trainer_reads(self, reviewer, lexicon):
        """The better of two finished continuations is chosen; the openings of the parts are all different."""
        model, tokenizer = film_reviews.load_model(reviewer), film_reviews.load_tokenizer(reviewer)
        pairs = film_reviews.make_pairs(model, tokenizer, film_reviews.make_openings(8, seed=2), seed=0)
        assert len(pairs) >= 8
        assert all(film_reviews.reward(pair["chosen"]) > film_reviews.reward(pair["rejected"]) for pair in pairs)
        parts = [
            tdpo_frontier.openings_of(part, tdpo_frontier.TINY) for part in ("sft", "held_out", "seed_0", "seed_1")
        ]
        assert len({opening for part in parts for opening in part}) == sum(map(len, parts)) == 24 + 8 + 2 * 8

    def test_reward_at_a_kl_is_between_the_evaluations_around_it(self):
        run = [{"kl": kl, "reward": reward} for kl, reward in ((0, 0.0), (1, 0.2), (5, 0.6), (4, 0.1))]
        assert [tdpo_frontier_figure.reward_at(run, budget) for budget in (0.5, 2, 5)] == [
            pytest.approx(0.1),
            pytest.approx(0.3),
            None,
        ]
        assert tdpo_frontier_figure.reached([0.5, None, 0.5]) == "0.500 ± 0.000 (2 of 3)"

    @pytest.mark.parametrize(
        ("text", "kept"),
        [
            (" is slow. I slept. Then", " is slow. I slept."),
            (" is far too slow\nReview: It", None),
            (" has the rating of 5/10.", None),
        ],
    )
    def test_only_whole_sentences_are_learned(self, text, kept):
        assert film_reviews.first_sentences(text) == kept

    @pytest.mark.slow
    def test_runs_end_to_end_once(self, reviewer, lexicon, tmp_path, monkeypatch, capsys):
        """A second call reads what the first has written: with another reward, new runs would give other rows."""

        def call() -> list[dict]:
            return tdpo_frontier.main(
                [
                    *("--model", str(reviewer), "--tiny", "--seeds", "1", "--betas", "0.1", "--steps", "2"),
                    *("--methods", *methods, "--learning_rate", "1e-4"),
                    *("--output", str(tmp_path / "work"), "--csv", str(tmp_path / "rows.csv")),
                ]
            )

        monkeypatch.setattr(runs, "ProcessPoolExecutor", NoPool)
        methods = ("DPO", "TDPO2, α = 0.5")
        rows = call()
        assert [(row["method"], row["step"]) for row in rows] == [(method, n) for method in methods for n in (0, 1, 2)]
        assert all((row[name] == 0) == (row["step"] == 0) for row in rows for name in ("kl", "seq_kl_chosen"))
        dpo, tdpo = (row for row in rows if row["step"] == 2)
        assert dpo["seq_kl_rejected"] != tdpo["seq_kl_rejected"]
        assert len(read(tmp_path / "rows.csv", texts=["method"])) == len(rows)

        assert (tmp_path / "rows.svg").exists()
        last = f"| TDPO2, α = 0.5 | 0.1 | {tdpo['reward']:.3f} | {tdpo['kl']:.2f} | {tdpo['seq_kl_chosen']:.2f} |"
        assert last in capsys.readouterr().out

        monkeypatch.setattr(tdpo_frontier, "reward", lambda text: 0.0)
        monkeypatch.setattr(film_reviews, "reward", lambda text: 0.0)
        assert call() == rows
        with pytest.raises(ValueError, match="Give another --output"):
            tdpo_frontier.main(["--model", "another", "--tiny", "--output", str(tmp_path / "work")])
