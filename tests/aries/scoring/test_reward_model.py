"""
Reward models, by vLLM and by transformers. Oracle: the model's own logits on each text alone, unpadded.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from trl_ext.aries.config import GenerationConfig, ScorerConfig
from trl_ext.aries.data.records import Answer, Chain, read_jsonl, write_jsonl
from trl_ext.aries.scoring.reward_model import (
    RewardModel,
    check_reward_model,
    encode_answer,
    without_padding,
)
from trl_ext.aries.scoring.scores import ScoreCache, ScoreTask, score_rows
from trl_ext.recipe import RecipeError


GENERATION = GenerationConfig(max_num_seqs=8, cpu_kv_cache_gib=1)
TEXTS = ("1", "1 2 2", "3 3 3 1 2 2 9 8 7 1 5", "")


def save_reward_model(path: Path, source: str, **settings) -> Path:
    """A random Llama of one output, large enough in its weights for scores that differ, with the source's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(source, num_labels=1, initializer_range=0.2, **settings)
    AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).save_pretrained(path)
    AutoTokenizer.from_pretrained(source).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory, tiny_model_path) -> Path:
    """Its padding token is the EOS, with which its chat template ends every text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    path = tmp_path_factory.mktemp("rm") / "model"
    return save_reward_model(path, tiny_model_path, pad_token_id=tokenizer.eos_token_id)


def conversations() -> list[Chain]:
    return [
        Chain(
            str(i),
            [{"role": "user", "content": question}],
            [Answer(k, text, 1, "stop") for k, text in enumerate(TEXTS, 1)],
        )
        for i, question in enumerate(["Sort : 2 1", "Sort : 3 3 1 2 9"])
    ]


def logits(path: Path, chain: Chain) -> list[float]:
    """The oracle."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    found = []
    for answer in chain.answers:
        if isinstance(chain.prompt, str):
            ids = tokenizer(chain.prompt + answer.text, return_tensors="pt")
        else:
            messages = [*chain.prompt, {"role": "assistant", "content": answer.text}]
            ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            found.append(model(**ids).logits.item())
    return found


def write_task(path: Path, chains: list[Chain]) -> ScoreTask:
    write_jsonl(path / "prompts.jsonl", ({"prompt_id": chain.prompt_id, "prompt": chain.prompt} for chain in chains))
    write_jsonl(path / "answers.jsonl", (chain.to_row() for chain in chains))
    return ScoreTask(path / "prompts.jsonl", path / "answers.jsonl")


def scorer(path: Path, backend: str = "transformers", **settings) -> RewardModel:
    config = ScorerConfig(reward_model=str(path), reward_model_backend=backend, **settings)
    return RewardModel(config, GENERATION)


def score_here(path: Path, task: ScoreTask, cache: Path, batch_size: int = 16) -> tuple[list, list[str], list[tuple]]:
    """With transformers, in this process: scores, notes and reports of progress."""
    model, reports = scorer(path, batch_size=batch_size), []
    notes = model.score([task], ScoreCache(cache), lambda *report: reports.append(report))
    rows = score_rows(task, [model], ScoreCache(cache))
    return [row["scores"] for row in rows], notes, reports


def score(scorer: RewardModel, chains: list[Chain], tmp_path: Path) -> tuple[list[list[float | None]], list[str]]:
    """Scores, and what the user is told, in a process of their own: vLLM gives nothing back."""
    task, cache = write_task(tmp_path, chains), tmp_path / "cache.jsonl"
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        notes = pool.submit(score_task, scorer, task, cache).result()
    return [row["scores"] for row in score_rows(task, [scorer], ScoreCache(cache))], notes


def score_task(scorer: RewardModel, task: ScoreTask, cache: Path) -> list[str]:
    return scorer.score([task], ScoreCache(cache), lambda *_: None)


@pytest.mark.vllm
def test_vllm_gives_the_logits(reward_model, tmp_path):
    """
    In float32 to 1e-4, no sigmoid. The texts end in the token that is also the padding, which transformers passes over.
    """
    chains = conversations()
    scores, notes = score(scorer(reward_model, "auto"), chains, tmp_path)
    expected = [logits(reward_model, chain) for chain in chains]
    assert notes == [] and scores == [pytest.approx(values, abs=1e-4) for values in expected]
    assert max(map(max, expected)) > 1 or min(map(min, expected)) < 0, "a sigmoid could have made them"

    # What is there is not scored again, with nothing loaded
    task, reports = write_task(tmp_path, chains), []
    model = scorer(reward_model, "auto")
    assert model.score([task], ScoreCache(tmp_path / "cache.jsonl"), lambda *at: reports.append(at)) == reports == []


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gpt_neox", "opt"])
def test_vllm_gives_the_logits_of_other_families(tiny_model_path, tmp_path, family):
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **{
            "qwen2": {"num_key_value_heads": 1},
            "qwen3": {"num_key_value_heads": 1, "head_dim": 32},
            "gpt_neox": {},
            "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
        }[family],
    )
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    scores, notes = score(scorer(tmp_path / "model", "vllm"), conversations(), tmp_path)
    assert notes == []
    assert scores == [pytest.approx(logits(tmp_path / "model", chain), abs=1e-4) for chain in conversations()]


@pytest.mark.parametrize("pad", ["eos", "own", None])
def test_transformers_gives_the_logits(tiny_model_path, tmp_path, pad):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    pad_token_id = {"eos": tokenizer.eos_token_id, "own": tokenizer.pad_token_id, None: None}[pad]
    path = save_reward_model(tmp_path / "model", tiny_model_path, pad_token_id=pad_token_id)
    plain = Chain("p", "Sort : 2 1", [Answer(1, " 1 2", 2, "stop"), Answer(2, " 2", 1, "stop")])
    chains = [*conversations(), plain]
    scores, notes, reports = score_here(path, write_task(tmp_path, chains), tmp_path / "cache.jsonl", batch_size=3)
    assert scores == [pytest.approx(logits(path, chain), abs=1e-4) for chain in chains]
    assert notes == [] and reports == [(done, 10) for done in range(1, 11)]


def test_an_answer_longer_than_the_model_has_no_score(tiny_model_path, tmp_path):
    path = save_reward_model(tmp_path / "model", tiny_model_path, max_position_embeddings=20)
    scores, notes, _ = score_here(path, write_task(tmp_path, conversations()), tmp_path / "cache.jsonl")
    lengths = [len(encode_answer(tokenizer_of(path), c.prompt, a.text)) for c in conversations() for a in c.answers]
    expected = [length <= 20 for length in lengths]
    assert [score is not None for chain in scores for score in chain] == expected and 0 < expected.count(False) < 8
    assert notes == [f"{path} takes 20 tokens: {expected.count(False)} longer answers have no score"]


def tokenizer_of(path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def save_deberta(path: Path, source: str) -> Path:
    """A DeBERTa reward model, an architecture that vLLM does not have."""
    from transformers import AutoModelForSequenceClassification, DebertaV2Config

    tokenizer = tokenizer_of(source)
    config = DebertaV2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # transformers' DeBERTa
def test_what_vllm_does_not_have_goes_to_transformers(tiny_model_path, tmp_path):
    path = save_deberta(tmp_path / "model", tiny_model_path)
    with pytest.raises(
        RecipeError, match="vLLM cannot serve .*DebertaV2ForSequenceClassification.*Write `transformers`"
    ):
        score(scorer(path, "vllm"), conversations(), tmp_path)
    scores, [note] = score(scorer(path, "auto"), conversations(), tmp_path)
    assert note.startswith(f"{path} is scored by transformers: Model architectures ['DebertaV2") and len(note) < 300
    assert scores == [pytest.approx(logits(path, chain), abs=1e-4) for chain in conversations()]


def test_without_padding():
    assert without_padding([5, 2, 7, 2, 2], 2) == [5, 2, 7]
    assert without_padding([5, 2], None) == [5, 2]
    assert without_padding([2, 2], 2) == [2]


def test_scores_are_kept_batch_by_batch(reward_model, tmp_path):
    """The cache as a killed child leaves it, a line torn: only the rest is scored, and the file is continued."""
    task, cache = write_task(tmp_path, conversations()), tmp_path / "cache.jsonl"
    scores, _, _ = score_here(reward_model, task, cache)
    lines = cache.read_bytes().splitlines(keepends=True)
    assert len(lines) == 8
    cache.write_bytes(b"".join(lines[:5]) + lines[5][:20])
    again, _, reports = score_here(reward_model, task, cache)
    assert reports[-1] == (3, 3)
    assert again == [pytest.approx(values, abs=1e-5) for values in scores]
    assert cache.read_bytes().startswith(b"".join(lines[:5])) and len(read_jsonl(cache)) == 8


def test_a_score_that_is_no_number_ends_the_run(tiny_model_path, tmp_path):
    """A head with one weight that is NaN: its answers would be neither best nor worst, and compare as false with all others."""
    from safetensors.torch import load_file, save_file

    path = save_reward_model(tmp_path / "broken", tiny_model_path)
    weights = load_file(path / "model.safetensors")
    weights["score.weight"][0, 0] = float("nan")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    task, cache = write_task(tmp_path, conversations()), tmp_path / "cache.jsonl"
    with pytest.raises(
        RecipeError, match="`scores.reward_model`: .*/broken gives nan for an answer of .* tokens. Its weights"
    ):
        score_here(path, task, cache)
    assert not cache.exists()


def test_another_model_backend_or_revision_is_another_scorer(reward_model, tiny_model_path, tmp_path):
    chain = conversations()[0]

    def key(**settings):
        model = RewardModel(ScorerConfig(**({"reward_model": str(reward_model)} | settings)), GENERATION)
        return next(model.keys(chain, {}))

    other = save_reward_model(tmp_path / "other", tiny_model_path)
    others = [
        key(reward_model=str(other)),
        key(reward_model_backend="vllm"),
        key(reward_model_revision="v2"),
        key(reward_model="hub/id"),
    ]
    assert len({key(), *others}) == 5
    assert key() == key(batch_size=1, weight=2.0, name="other")
    before = key(reward_model=str(other))
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    assert key(reward_model=str(other)) != before


class TestCheck:
    def test_a_reward_model(self, reward_model):
        check_reward_model(str(reward_model), None, conversational=True)

    def test_a_classifier(self, tiny_model_path, tmp_path):
        from transformers import AutoModelForSequenceClassification

        model = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=3)
        model.save_pretrained(tmp_path)
        tokenizer_of(tiny_model_path).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="has 3 outputs, and a reward model has one"):
            check_reward_model(str(tmp_path), None, conversational=True)

    def test_a_language_model_with_one_label(self, reward_model, tmp_path):
        """transformers would load it, with a random head."""
        config = json.loads((reward_model / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        tokenizer_of(reward_model).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="is a LlamaForCausalLM, and a reward model is a ...ForSequenceClass"):
            check_reward_model(str(tmp_path), None, conversational=True)

    def test_no_chat_template(self, reward_model, tmp_path):
        tokenizer = tokenizer_of(reward_model)
        tokenizer.chat_template = None
        tokenizer.save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text((reward_model / "config.json").read_text())
        check_reward_model(str(tmp_path), None, conversational=False)
        with pytest.raises(ValueError, match="has no chat template"):
            check_reward_model(str(tmp_path), None, conversational=True)

    def test_nowhere(self, tmp_path):
        with pytest.raises(ValueError, match="nowhere"):
            check_reward_model(str(tmp_path / "nowhere"), None, conversational=True)
