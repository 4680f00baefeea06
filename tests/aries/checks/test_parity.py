"""
The parity check: which policy answered, told from log-probabilities; the KL; and the real engine against transformers.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.aries.engine_process import run_engine
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_ext.aries.checks import parity
from trl_ext.aries.children import ChildError
from trl_ext.aries.config import DraftsConfig, GenerationConfig
from trl_ext.aries.data.records import read_jsonl, to_line
from trl_ext.aries.generation.chains import EngineSettings
from trl_ext.aries.generation.generate import ParitySamples
from trl_ext.aries.policies import Comparison, Policy


@pytest.fixture(scope="module")
def adapters(tiny_model_path, tmp_path_factory) -> dict[str, str]:
    """Two rounds' adapters on the tiny model, the second a small step from the first."""
    path = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    policy = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    found = {}
    for name, std in (("round_01", 0.5), ("round_02", 0.02)):
        for parameter_name, parameter in policy.named_parameters():
            if "lora_B" in parameter_name:
                parameter.data += std * torch.randn(parameter.shape)
        policy.save_pretrained(path / name)
        found[name] = str(path / name)
    return found


@pytest.fixture(scope="module")
def other_model_path(tiny_model_path, tmp_path_factory) -> str:
    """Another checkpoint of the same architecture."""
    path = tmp_path_factory.mktemp("other")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(path)
    return str(path)


def model_of(path: str, adapter: str | None) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()


@torch.no_grad()
def all_logps(model: torch.nn.Module, row: dict) -> torch.Tensor:
    """The oracle: log-probabilities of the whole text in float64, cut to the answer."""
    ids = torch.tensor([row["prompt_token_ids"] + row["token_ids"]])
    logps = model.double()(input_ids=ids).logits[0].log_softmax(-1)
    return torch.stack([logps[i - 1, ids[0, i]] for i in range(len(row["prompt_token_ids"]), ids.shape[1])])


def sample(model: torch.nn.Module, tokenizer, count: int = 16, **changes) -> list[dict]:
    """Rows as the engine writes them, sampled by transformers."""
    torch.manual_seed(0)
    rows = []
    for i in range(count):
        prompt = [{"role": "user", "content": f"Sort : {i % 10} 3 1 2"}]
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        output = model.float().generate(
            input_ids=torch.tensor([ids]), do_sample=True, top_k=0, temperature=1.0, max_new_tokens=8
        )
        rows.append({"prompt_id": str(i), "prompt_token_ids": ids, "token_ids": output[0, len(ids) :].tolist()})
    return [row | {"logps": all_logps(model, row).tolist(), "dtype": "float32"} | changes for row in rows]


@pytest.fixture
def check(tiny_model_path, adapters, tmp_path):
    """Runs the check of round 2's policy, with an adapter, on rows; returns what it wrote."""

    def run(rows: list[dict], **changes) -> dict:
        policies = {
            "policy": Policy(tiny_model_path, adapters["round_02"]),
            "base": Policy(tiny_model_path, None),
            "initial": Policy(tiny_model_path, None),
            "previous": Policy(tiny_model_path, adapters["round_01"]),
        }
        comparison = replace(Comparison(2, policies, use_cpu=True), **changes)
        samples, output = tmp_path / "parity.jsonl", tmp_path / "parity.json"
        samples.write_text("".join(map(to_line, rows)))
        output.unlink(missing_ok=True)
        parity.check_parity(comparison, samples, output, [Path("parity.jsonl"), Path("evaluation.jsonl")])
        return json.loads(output.read_text())

    return run


def test_the_nearest_policy_is_named():
    """
    By hand: `found` is 0.1 off the policy and 0.3 off the other at each of 100 tokens. With the names exchanged, the other
    is the nearer one; with an offset of 0.1 in both and a tolerance below it, nobody is.
    """
    policy, other = torch.zeros(100), torch.full((100,), 0.4)
    measured = parity.compare(policy + 0.1, policy, {"previous": other}, tolerance=0.2)
    assert measured["difference"] == pytest.approx(0.1)
    assert measured["others"]["previous"] == {"difference": pytest.approx(0.3), "distinguishable": True}
    assert measured["fault"] is None
    assert parity.compare(policy + 0.1, other, {"previous": policy}, tolerance=0.5)["fault"] == "previous"
    assert parity.compare(policy + 0.1, policy, {"previous": other}, tolerance=0.05)["fault"] == "tolerance"
    assert parity.compare(policy + float("nan"), policy, {}, tolerance=0.05)["fault"] == "tolerance"


def test_a_step_smaller_than_the_rounding_is_no_fault_and_a_larger_one_is_found():
    """Rounding of 0.03 over 400 tokens: its mean is known to 0.0015, so steps of 0.001 are hidden, and steps of 0.02 are not."""
    generator = torch.Generator().manual_seed(0)
    for step, seen in ((0.001, False), (0.02, True)):
        policy = -torch.rand(400, generator=generator)
        previous = policy + step * torch.randn(400, generator=generator)
        for actual, fault in ((policy, None), (previous, "previous" if seen else None)):
            found = actual + 0.03 * torch.randn(400, generator=generator)
            measured = parity.compare(found, policy, {"previous": previous}, tolerance=0.2)
            assert measured["others"]["previous"]["distinguishable"] == seen
            assert measured["fault"] == fault


def test_kl_of_answers_by_hand():
    """Log-ratios 0.5 + 0.5 and −0.5: means 0.25 per answer and 0.5 / 3 per token; standard error 0.75·√2 / √2."""
    policy = [torch.tensor([-1.0, -1.0]), torch.tensor([-2.0])]
    initial = [torch.tensor([-1.5, -1.5]), torch.tensor([-1.5])]
    estimate = parity.kl_estimate(policy, initial)
    assert estimate == {
        "per_answer": pytest.approx(0.25),
        "standard_error": pytest.approx(0.75),
        "per_token": pytest.approx(0.5 / 3),
        "answers": 2,
    }
    assert parity.kl_estimate(policy, policy)["per_answer"] == 0.0


@torch.no_grad()
def test_kl_is_the_kl_of_the_models(tiny_model_path, other_model_path):
    """Oracle: the sum over the vocabulary. 2,000 one-token answers to one prompt, sampled from the policy."""
    policy, initial = model_of(other_model_path, None), model_of(tiny_model_path, None)
    prompt = torch.arange(6, 14)
    logps, initial_logps = (model(input_ids=prompt[None]).logits[0, -1].log_softmax(-1) for model in (policy, initial))
    exact = (logps.exp() * (logps - initial_logps)).sum().item()
    tokens = torch.multinomial(logps.exp(), 2000, replacement=True, generator=torch.Generator().manual_seed(0))
    estimate = parity.kl_estimate(list(logps[tokens][:, None]), list(initial_logps[tokens][:, None]))
    assert exact > 5 * estimate["standard_error"]
    assert abs(estimate["per_answer"] - exact) < 4 * estimate["standard_error"]


def test_the_policy_passes_with_its_kl(check, tiny_model_path, adapters):
    """Oracle: float64 log-probabilities of whole texts by transformers."""
    policy, tokenizer = model_of(tiny_model_path, adapters["round_02"]), AutoTokenizer.from_pretrained(tiny_model_path)
    rows = sample(policy, tokenizer)
    found = check(rows)
    assert found["answers"] == 16 and found["tokens"] == sum(len(row["token_ids"]) for row in rows)
    assert found["difference"] < 1e-4 and found["tolerance"] == 0.01
    assert found["others"].keys() == {"base", "previous"}, "the initial policy is the base"
    assert all(other["distinguishable"] for other in found["others"].values())
    base = model_of(tiny_model_path, None)
    ratios = [sum(row["logps"]) - all_logps(base, row).sum().item() for row in rows]
    assert found["kl_to_initial"]["per_answer"] == pytest.approx(sum(ratios) / 16, abs=1e-3)


@pytest.mark.parametrize(
    ("answered_by", "message"),
    [
        ("base", "the model without an adapter by .*not applied"),
        ("round_01", "the policy of the round before by .*not applied"),
        ("another model", r"the tolerance is 0\.01\. Its base model"),
    ],
)
def test_another_policy_stops_the_run(check, tiny_model_path, adapters, other_model_path, answered_by, message):
    model = {
        "base": lambda: model_of(tiny_model_path, None),
        "round_01": lambda: model_of(tiny_model_path, adapters["round_01"]),
        "another model": lambda: model_of(other_model_path, adapters["round_02"]),
    }[answered_by]()
    with pytest.raises(ChildError, match=message) as error:
        check(sample(model, AutoTokenizer.from_pretrained(tiny_model_path)))
    assert "did not answer with the policy of round 2" in str(error.value)
    assert "delete parity.jsonl and evaluation.jsonl, and " in str(error.value)


def test_full_fine_tuning_is_checked_by_its_weights(check, tiny_model_path, other_model_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    whole = {
        "policy": Policy(other_model_path, None),
        "initial": Policy(tiny_model_path, None),
    }
    found = check(sample(model_of(other_model_path, None), tokenizer), policies=whole)
    assert found["difference"] < 1e-4
    assert found["kl_to_initial"]["per_answer"] > 0
    with pytest.raises(ChildError, match="from those of the policy before round 1 by"):
        check(sample(model_of(tiny_model_path, None), tokenizer), policies=whole)


def test_the_initial_policy_has_no_kl_to_itself(check, tiny_model_path):
    itself = Policy(tiny_model_path, None)
    rows = sample(model_of(tiny_model_path, None), AutoTokenizer.from_pretrained(tiny_model_path))
    found = check(rows, policies={"policy": itself, "initial": itself}, number=0)
    assert found["others"] == {}
    kl = found["kl_to_initial"]
    assert (kl["per_answer"], kl["per_token"], kl["standard_error"], kl["answers"]) == (0.0, 0.0, 0.0, 16)


def test_nf4_is_compared_in_the_engine_s_precision(check, tiny_model_path, adapters):
    """What NF4 changes is reported and is no fault; answers without the adapter still are one."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    nf4 = {"trained_on": {"dtype": "float32", "load_in_4bit": True}}
    found = check(sample(model_of(tiny_model_path, adapters["round_02"]), tokenizer), **nf4)
    assert found["difference"] < 1e-4
    assert found["trained_precision_difference"] > 10 * found["difference"]
    with pytest.raises(ChildError, match="without an adapter"):
        check(sample(model_of(tiny_model_path, None), tokenizer), **nf4)


@pytest.mark.vllm
def test_the_engine_s_log_probabilities_are_those_of_transformers(check, tiny_model_path, adapters, tmp_path):
    """
    Oracle: transformers in float64. A prompt too long is left out. The check takes the engine's answers as the policy's, and
    names the policy where the recipe says another round's.
    """
    prompts = [{"prompt_id": str(i), "prompt": [{"role": "user", "content": f"Sort : {i} 3 1"}]} for i in range(16)]
    prompts.insert(3, {"prompt_id": "long", "prompt": [{"role": "user", "content": " ".join(["1"] * 60)}]})
    file, answers = tmp_path / "prompts.jsonl", tmp_path / "engine.jsonl"
    file.write_text("".join(map(to_line, prompts)))
    config = GenerationConfig(max_model_len=64, max_num_seqs=4, dtype="float32", cpu_kv_cache_gib=1)
    settings = EngineSettings(tiny_model_path, config, ("round_02", 3, adapters["round_02"]), max_lora_rank=8)
    samples = ParitySamples(file, answers, 17, DraftsConfig(max_tokens=8), seed=(0, "parity"))
    run_engine(settings, [], samples)
    rows = read_jsonl(answers)
    assert [row["prompt_id"] for row in rows] == [str(i) for i in range(16)]
    policy, tokenizer = model_of(tiny_model_path, adapters["round_02"]), AutoTokenizer.from_pretrained(tiny_model_path)
    ended = 0
    for row in rows:
        torch.testing.assert_close(torch.tensor(row["logps"]).double(), all_logps(policy, row), atol=1e-4, rtol=0)
        ended += row["token_ids"][-1] == tokenizer.eos_token_id
    assert {row["dtype"] for row in rows} == {"float32"}
    assert ended > 0, "the EOS token and its log-probability belong to the answer"
    assert check(rows)["difference"] < 1e-4

    first, second = (Policy(tiny_model_path, adapters[name]) for name in ("round_01", "round_02"))
    with pytest.raises(ChildError, match="the policy of the round before"):
        check(rows, policies={"policy": first, "initial": first, "previous": second})
