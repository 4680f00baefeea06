"""Health: what is measured, by hand, and what the loop does with a policy that has degenerated and with what is left of its data."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from trl_ext.aries.checks.gates import measure_policy, policy_findings
from trl_ext.aries.config import AriesConfig, EvaluationConfig, HealthConfig, PairsConfig, PromptsConfig, ScoresConfig
from trl_ext.aries.data.faults import share_finding
from trl_ext.aries.data.records import Answer, Chain, write_json, write_jsonl
from trl_ext.aries.inputs import Inputs, read_inputs
from trl_ext.aries.policies import is_decided
from trl_ext.aries.results.status import status
from trl_ext.aries.rounds import Rounds
from trl_ext.recipe import RecipeError


def chains(*texts: str | None) -> list[Chain]:
    """A chain for each direct answer, a token a word; `None` for a prompt without an answer."""
    return [
        Chain(f"p-{i}", "x", [] if text is None else [Answer(1, text, len(text.split()), "stop")])
        for i, text in enumerate(texts)
    ]


INITIAL = chains("a b c d", "e f g h", "i j k l", "m n o p")  # 4 tokens, and 12 pairs of words, all different


def test_measures_by_hand():
    """Two answers of 2 tokens, one of 4 that repeats itself, none: 8 tokens over 4 prompts; pairs ab, ab, aa, aa, aa: 2 of 5."""
    measured = measure_policy(chains("a b", "a b", "a a a a", None), INITIAL, kl_per_token=0.5)
    assert measured == {
        "kl_per_token": 0.5,
        "length": 2.0,
        "length_ratio": 0.5,
        "diversity": 0.4,
        "diversity_ratio": 0.4,
    }
    assert (
        measure_policy(INITIAL, INITIAL, None)["length_ratio"]
        == measure_policy(INITIAL, INITIAL, None)["diversity_ratio"]
        == 1.0
    )


def test_nothing_to_compare_with():
    """Without answers in round 0, or pairs of words, a ratio is not measured, and not judged."""
    measured = measure_policy(chains("a"), chains(None), None)
    assert measured["length_ratio"] is None and measured["diversity_ratio"] is None
    assert policy_findings(measured, HealthConfig()) == []


@pytest.mark.parametrize(
    ("answers", "kl", "found"),
    [
        (("a b c d", "e f g h", "i j k l", "m n o p"), 0.2, []),
        (("a b c d",) * 4, 1.5, []),  # 3 of 12 pairs are different: a quarter of round 0's, at the bounds
        (("a b c d",) * 4, 1.51, ["KL to the initial policy is 1.51 nats per token, more than `health.max_kl` (1.5)"]),
        (("a b c d",) * 4, float("nan"), ["KL to the initial policy is nan nats per token"]),
        (
            ("", "", "", "m"),
            0.2,
            ["have 0.25 tokens on average, 0.062 times round 0's, less than `health.min_length` (0.1)"],
        ),
        ((None, None, None, None), 0.2, ["have 0 tokens on average"]),
        (("a " * 40,) * 4, 0.2, ["0.0064 times round 0's, less than `health.min_diversity` (0.1): they repeat"]),
    ],
)
def test_findings(answers, kl, found):
    sentences = policy_findings(measure_policy(chains(*answers), INITIAL, kl), HealthConfig())
    assert len(sentences) == len(found)
    assert all(part in sentence for part, sentence in zip(found, sentences, strict=True))


def test_the_kl_bound_is_between_the_rounds_of_the_evidence():
    """Rounds that improve a pretrained model are within the bound, policies that write nothing but repetitions are beyond it."""

    def rows_of(name: str) -> list[dict[str, str]]:
        with open(Path(__file__).parents[3] / "docs/evidence/real" / name, encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def found(kl: float) -> list[str]:
        return policy_findings(measure_policy(INITIAL, INITIAL, kl), HealthConfig())

    rounds = [row for row in rows_of("aries.csv") if row["turn"] == "1" and row["round"] != "0"]
    start = {row["method"]: row for row in rows_of("aries.csv") if row["turn"] == "1" and row["round"] == "0"}
    assert len(rounds) == 9
    assert all(float(row["right_seen"]) > float(start[row["method"]]["right_seen"]) for row in rounds)
    assert not any(found(float(row["kl_per_token"])) for row in rounds)
    repeating = [row for row in rows_of("tdpo_frontier.csv") if float(row["distinct_2"]) < 0.25]
    assert repeating and all(found(float(row["kl"]) / float(row["length"])) for row in repeating)


def test_a_bound_of_null_is_none():
    off = HealthConfig(max_dropped=None, max_kl=None, min_length=None, min_diversity=None)
    assert policy_findings(measure_policy(chains(None, "a a a a a", None, None), INITIAL, 1000.0), off) == []
    assert share_finding("rows", {"bad": 9}, 10, off) is None


def test_a_share_at_the_bound_passes():
    assert share_finding("rows", {"bad": 5}, 10, HealthConfig()) is None
    assert "6 of 10 rows cannot be used (1 a, 5 b), more than" in share_finding(
        "rows", {"b": 5, "a": 1}, 10, HealthConfig()
    )
    assert share_finding("rows", {}, 10, HealthConfig(max_dropped=0.0)) is None
    assert share_finding("rows", {"bad": 5}, 10, None) is None
    assert share_finding("rows", {"bad": 6}, 10, None) == "6 of 10 rows cannot be used (6 bad)"


# In the loop


@pytest.fixture
def config(tmp_path):
    return AriesConfig(
        output_dir=str(tmp_path / "run"),
        model={"model_name_or_path": "m", "use_peft": True},
        prompts=PromptsConfig("p.jsonl", per_round=4),
        evaluation=EvaluationConfig("e.jsonl"),
        training={"trainer": "dpo"},
        scores=ScoresConfig(verifier="v.py:f"),
        rounds=2,
    )


@pytest.fixture
def evaluated(config):
    """A run whose round 1 has been trained and has answered the evaluation prompts; with bounds of its own if asked to."""
    loop = Rounds(config, inputs=None)
    write_prompts = [{"prompt_id": chain.prompt_id, "prompt": "x"} for chain in INITIAL]
    for number, answers in ((0, INITIAL), (1, chains("", "", "", "m"))):
        round_dir = loop.dir.round(number)
        round_dir.path.mkdir(parents=True)
        write_jsonl(round_dir.evaluation, [chain.to_row() for chain in answers])
    write_jsonl(loop.dir.evaluation_prompts, write_prompts)
    write_json(loop.dir.round(1).parity, {"kl_to_initial": {"per_token": 7.5}})
    loop.dir.round(1).adapter.mkdir()
    (loop.dir.round(1).adapter / "adapter_model.safetensors").write_text("weights")
    return lambda **bounds: Rounds(replace(config, health=HealthConfig(**bounds)), inputs=None)


def test_a_degenerate_policy_is_set_aside_and_the_one_before_stays(evaluated, capsys):
    loop = evaluated()
    with pytest.raises(
        RecipeError, match="the policy of round 1 has degenerated: its KL .*7.5 nats.*; its direct answers"
    ) as error:
        loop.check_health(1)
    message = str(error.value)
    assert f"set aside in {loop.dir.path}/round_01/set_aside/adapter, and the last good policy is m." in message
    for way_out in ("learning_rate", "output_dir", "--health.max_kl null"):
        assert way_out in message
    assert not loop.dir.round(1).adapter.exists() and not is_decided(loop.dir.round(1), loop.config)
    assert (loop.dir.round(1).set_aside / "adapter" / "adapter_model.safetensors").read_text() == "weights"
    found = json.loads(loop.dir.round(1).health.read_text())
    assert found["decision"] == "set_aside" and len(found["findings"]) == 2 and found["kl_per_token"] == 7.5
    status(loop.config)
    assert "training set aside as degenerate" in capsys.readouterr().out.replace("\n", " ")


def test_a_run_that_was_stopped_stops_again_until_it_has_other_bounds(evaluated):
    """Before it trains anew: a child process would fail without a model."""
    with pytest.raises(RecipeError):
        evaluated().check_health(1)
    for bounds in ({}, {"max_kl": None}, {"min_length": None}):
        with pytest.raises(RecipeError, match="the policy of round 1 has degenerated"):
            evaluated(**bounds).train(1)
    loop = evaluated(max_kl=8.0, min_length=0.05)
    loop.train(1)
    assert (loop.dir.round(1).adapter / "adapter_model.safetensors").read_text() == "weights"
    loop.check_health(1)
    assert json.loads(loop.dir.round(1).health.read_text())["decision"] == "kept"


def test_bounds_may_be_changed_in_a_run(config):
    for health in (HealthConfig(), HealthConfig(max_kl=None, max_dropped=0.9, min_length=0.5, min_diversity=1.0)):
        loop = Rounds(replace(config, health=health), inputs=None)
        with loop.dir.opened(loop.config, "recipe: text\n", {}):
            pass


def test_a_round_whose_chains_are_mostly_unusable_stops_with_the_counts(config, capsys):
    """Three of four prompts are too long. A larger share goes on, with the one pair there is; what is left out shows in the status."""
    config = replace(config, pairs=PairsConfig())
    for number, bound in enumerate((0.5, 0.75)):
        loop = Rounds(replace(config, health=HealthConfig(max_dropped=bound)), inputs=None)
        round_dir = loop.dir.round(1)
        round_dir.path.mkdir(parents=True, exist_ok=True)
        whole = [Answer(1, "a", 1, "stop"), Answer(2, "b", 1, "stop")]
        made = [Chain("p-0", "x", whole)] + [Chain(f"p-{i}", "x", [], "prompt_too_long") for i in (1, 2, 3)]
        write_jsonl(round_dir.prompts, [{"prompt_id": chain.prompt_id, "prompt": "x"} for chain in made])
        write_jsonl(round_dir.answers, [chain.to_row() for chain in made])
        scores = [[0.0, 1.0], [], [], []]
        write_jsonl(
            round_dir.scores, [{"prompt_id": c.prompt_id, "scores": s} for c, s in zip(made, scores, strict=True)]
        )
        if number == 0:
            with pytest.raises(
                RecipeError, match=r"3 of 4 possible pairs cannot be used \(3 prompt_too_long\).*answers.jsonl"
            ):
                loop.pair(1)
            assert not round_dir.pairs.exists()
        else:
            loop.pair(1)
            assert round_dir.pairs.exists()
    capsys.readouterr()
    status(loop.config)
    assert "dropped: 3 prompt_too_long" in capsys.readouterr().out


def test_sft_rows_without_answers(config, tmp_path):
    """They are left out and counted; above the bound the run stops before anything is made."""
    for name in ("p", "e"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "x"}\n' * 8)
    (tmp_path / "v.py").write_text("def f(prompts, completions):\n    return [0.0] * len(completions)\n")
    sft = tmp_path / "sft.jsonl"
    config = replace(
        config,
        prompts=PromptsConfig(str(tmp_path / "p.jsonl")),
        evaluation=EvaluationConfig(str(tmp_path / "e.jsonl")),
        scores=ScoresConfig(verifier=f"{tmp_path}/v.py:f"),
        sft={"dataset": str(sft)},
    )
    row, empty = '{"prompt": "x", "completion": "y"}\n', '{"prompt": "x", "completion": ""}\n'
    sft.write_text(row + empty)
    inputs = read_inputs(config)
    assert len(inputs.sft_rows) == 1 and inputs.sft_dropped == {"empty_completion": 1}
    sft.write_text(row + empty * 2)
    with pytest.raises(RecipeError, match=r"2 of 3 rows of `sft.dataset` cannot be used \(2 empty_completion\)"):
        read_inputs(config)
    assert not Path(config.output_dir).exists()


def test_dropped_sft_rows_show_in_the_status(config, capsys):
    config = replace(config, sft={"dataset": "sft.jsonl"})
    rows, dropped = [{"prompt": "x", "completion": "y"}] * 2, {"empty_completion": 1}
    loop = Rounds(config, Inputs([], 0, [], rows, dropped))
    loop.dir.round(0).path.mkdir(parents=True)
    loop.write_sft_rows(loop.dir.round(0))
    assert json.loads(loop.dir.round(0).sft_drops.read_text()) == {"sft_rows": 3, "dropped": {"empty_completion": 1}}
    status(config)
    assert "dropped: 1 empty_completion" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.vllm
def test_a_run_that_stops_over_its_kl_and_then_goes_on(sorting, tmp_path):
    """The whole loop, with a bound that any training passes: it stops, stops again without training, and goes on without it."""
    output = tmp_path / "run"
    on_cpu = {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    lora = {"use_peft": True, "lora_r": 8, "lora_target_modules": ["q_proj", "v_proj", "up_proj"]}
    recipe = {
        "output_dir": str(output),
        "rounds": 1,
        "model": {"model_name_or_path": str(sorting / "model"), "dtype": "float32", **lora},
        "prompts": {"dataset": str(sorting / "train.jsonl"), "per_round": 24},
        "generation": {"max_model_len": 64, "max_num_seqs": 16, "dtype": "float32", "cpu_kv_cache_gib": 1},
        "drafts": {"temperature": 1.0, "max_tokens": 8},
        "refinements": {"turns": 2, "template": "{{ question }} Draft : {{ draft }} . Write a better answer ."},
        "scores": {"verifier": "recipes/quickstart/verifier.py:partial_match"},
        "pairs": {"guard": "warn"},
        "training": {"trainer": "dpo", **on_cpu, "max_steps": 4, "learning_rate": 5e-2},
        "evaluation": {"dataset": str(sorting / "eval.jsonl"), "samples": 10},
        "health": {"max_kl": 1e-9, "max_dropped": None, "min_length": None, "min_diversity": None},
    }
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "trl_ext.cli", "aries", "run", "--config", str(file)]
    aside, made = output / "round_01" / "set_aside" / "adapter", []
    for _ in range(2):
        stopped = subprocess.run(command, capture_output=True, text=True)
        assert stopped.returncode == 2, stopped.stdout + stopped.stderr
        assert "the policy of round 1 has degenerated: its KL to the initial policy is" in stopped.stderr
        assert not (output / "round_01" / "adapter").exists() and not (output / "round_01" / "manifest.json").exists()
        made.append((aside / "adapter_model.safetensors").stat().st_mtime_ns)
    assert made[0] == made[1]

    done = subprocess.run([*command, "--health.max_kl", "null"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (output / "round_01" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == made[0]
    manifest = json.loads((output / "round_01" / "manifest.json").read_text())
    assert manifest["health"] == "kept" and manifest["policy"]["adapter"] == str(output / "round_01" / "adapter")
