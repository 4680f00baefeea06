"""
The loop itself: real vLLM, TRL and PEFT on the sorting task at a tiny size, run by the command line, killed and run again.
"""

import json
import re
import subprocess

import pytest
import yaml
from datasets import load_dataset
from tests.aries.tiny_run import ON_CPU, command, recipe, run

from trl_ext.aries.data.records import read_jsonl
from trl_ext.cli import main


@pytest.mark.vllm
def test_the_loop(whole_run):
    """Every stage's file is there, the counts add up, and a finished run is left as it is."""
    whole, printed = whole_run

    # What was printed: a line per stage, drops, an estimate, the table
    assert re.search(r"round 1/2  drafts and refinements\s+34", printed)  # 24 prompts and 10 of the evaluation
    assert re.search(r"round 1/2  \d+ pairs \(\d+ rows\) from 24 chains", printed)
    assert "about" in printed and "to go" in printed
    assert re.search(
        r"after SFT .*\n.*\[.*\n.*round 1 .*\n.*\[.*\n.*round 2 .*\n.*\[", printed
    )  # score, then interval
    assert "Answer by answer: round 2" in printed

    # What was made
    for number in (1, 2):
        directory = whole / f"round_{number:02d}"
        prompts, chains = read_jsonl(directory / "prompts.jsonl"), read_jsonl(directory / "answers.jsonl")
        assert [row["prompt_id"] for row in prompts] == [row["prompt_id"] for row in chains] and len(prompts) == 24
        assert all([answer["turn"] for answer in row["answers"]] == [1, 2, 3] for row in chains)
        drops = json.loads((directory / "drops.json").read_text())
        assert drops["pairs"] + sum(drops["dropped"].values()) == 24
        pairs = load_dataset("json", data_files=str(directory / "pairs.jsonl"), split="train")
        assert len(pairs) == 3 * drops["pairs"]
        assert set(zip(pairs["turn"], pairs["draft"], pairs["weight"], strict=True)) == {
            (0, None, 2),
            (1, "rejected", 1),
            (1, "chosen", 1),
        }
        assert all(row["chosen_score"] > row["rejected_score"] for row in pairs)
        assert (directory / "adapter" / "adapter_model.safetensors").exists()
        manifest = json.loads((directory / "manifest.json").read_text())
        assert manifest["pairs"] == drops["pairs"] and manifest["sha256"]["pairs.jsonl"]
    first, second = ({row["prompt_id"] for row in read_jsonl(whole / f"round_0{n}" / "prompts.jsonl")} for n in (1, 2))
    assert not first & second
    evaluation = json.loads((whole / "round_02" / "metrics.json").read_text())
    assert evaluation["prompts"] == 10 and [turn["scored"] for turn in evaluation["turns"]] == [10, 10, 10]
    for turn in evaluation["turns"]:
        assert turn["interval"][0] <= turn["score"] <= turn["interval"][1]
        wins = turn["win_rate_round_0"]
        assert wins["wins"] + wins["ties"] + wins["losses"] == 10
    cost = json.loads((whole / "round_01" / "cost.json").read_text())
    assert [stage["stage"] for stage in cost["stages"]] == [
        "drafts and refinements",
        "parity",
        "scores",
        "training (tdpo)",
    ]
    assert all(stage["seconds"] >= 0 and stage["interrupted"] == 0 for stage in cost["stages"])
    drafts = [row["answers"][0] for row in read_jsonl(whole / "round_01" / "answers.jsonl")]
    assert cost["generated_tokens"]["drafts"] == sum(answer["tokens"] for answer in drafts)

    assert evaluation["kl_to_initial"]["answers"] == 10 and evaluation["kl_to_initial"]["per_answer"] != 0
    initial = json.loads((whole / "round_00" / "metrics.json").read_text())
    assert initial["kl_to_initial"]["per_answer"] == 0
    assert json.loads((whole / "round_02" / "manifest.json").read_text())["parity"]["difference"] < 1e-4

    # The report of a finished run, written by it
    report = (whole / "report.html").read_text(encoding="utf-8")
    assert "round 2</th>" in report and '<span class="badge finished">' in report
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", printed)
    assert "was not written" not in printed and f"{whole}/report.html" in printed

    # A finished run is left as it is
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file() and path.name != "run.lock"}
    run(whole.with_suffix(".yaml"))
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
@pytest.mark.vllm
def test_a_round_that_the_guard_stops_and_then_leaves_out(sorting, tmp_path):
    """
    Rule-based pairs under a verifier that likes all answers alike: the chosen are not better, and the run stops before
    training. With `--pairs.guard skip` it goes on from there, and ends with the policy it had, whose evaluation is the same.
    """
    (tmp_path / "verifier.py").write_text(
        "def same(prompts, completions, **kwargs):\n    return [0.5] * len(completions)\n"
    )
    changes = {
        "rounds": 1,
        "scores": {"verifier": f"{tmp_path}/verifier.py:same"},
        "pairs": {"selection": "rule_based", "settled_similarity": 0.0},
    }
    file, output = tmp_path / "r.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(recipe(sorting, output, **changes)))
    stopped = subprocess.run(command(file), capture_output=True, text=True)
    assert stopped.returncode == 2
    assert "round 1 would train the policy away from its better answers" in stopped.stderr
    report = (output / "report.html").read_text(encoding="utf-8")
    assert "The run stopped in round 1, guard" in report and "away from its better answers" in report
    assert "stopped: round 1, guard" in run(file, "status")
    assert "Traceback" not in stopped.stderr and not (output / "round_01" / "training").exists()
    pairs = (output / "round_01" / "pairs.jsonl").read_bytes()

    done = subprocess.run([*command(file), "--pairs.guard", "skip"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left untrained" in done.stdout
    assert f"The trained policy is {output / 'round_00' / 'adapter'}" in done.stdout.replace("\n", "")
    assert (output / "round_01" / "pairs.jsonl").read_bytes() == pairs
    assert not (output / "round_01" / "training").exists() and not (output / "round_01" / "adapter").exists()
    before, after = (output / f"round_{number:02d}" for number in (0, 1))
    assert (before / "evaluation.jsonl").read_bytes() == (after / "evaluation.jsonl").read_bytes()
    manifests = [json.loads((directory / "manifest.json").read_text()) for directory in (before, after)]
    assert manifests[1]["guard"] == "skipped" and manifests[1]["policy"] == manifests[0]["policy"]
    status = subprocess.run([*command(file, "status"), "--pairs.guard", "skip"], capture_output=True, text=True)
    assert "training left out by the guard" in status.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"training": {"trainer": "tdpo", "lerning_rate": 1e-6}},
            r"r\.yaml:\d+: unknown key `lerning_rate`.*learning_rate",
        ),
        (
            {"training": {"trainer": "tdpo", "ld_alpha": 0.5, **ON_CPU}},
            r"r\.yaml:\d+: `training`: `ld_alpha=0.5` is not",
        ),
        (
            {"training": {"trainer": "dpo", "objective": "squared", "use_weighting": True, **ON_CPU}},
            r"r\.yaml:\d+: `training`: `use_weighting=True` is not supported by SquaredRefinementDPOTrainer",
        ),
        ({"training": {"output_dir": "x"}}, r"r\.yaml:\d+: `training.output_dir` belongs to the loop"),
        ({"training": {"trainer": "ppo"}}, r"r\.yaml:\d+: `training.trainer` must be one of .*'ppo'"),
        ({"model": {"model_name_or_path": "./nowhere"}}, r"r\.yaml:\d+: `model.model_name_or_path`: .*nowhere"),
        ({"prompts": {"dataset": "nowhere.jsonl"}}, r"`prompts.dataset`: nowhere\.jsonl: no such file"),
        ({"scores": {"verifier": "nowhere.py:f"}}, "`scores.verifier`: 'nowhere.py:f' names no file"),
        (
            {"scores": {"judge": {"base_url": "http://127.0.0.1:9/v1", "model": "m"}}},
            r"`scores`: the judge m at http://127.0.0.1:9/v1 failed \(ConnectError",
        ),
        (
            {"scores": {"verifier": "v.py:f", "scorers": [{"reward_model": "rm"}]}},
            r"r\.yaml:\d+: `scores` has both `scorers` and a `verifier`",
        ),
        ({"scores": {}}, "names neither a `verifier` nor a `reward_model`"),
        ({"rounds": 50}, "50 rounds of 24 fresh prompts need 1200 rows, and the dataset has 60"),
        ({"refinements": {"template": "Improve this draft. {{ question }}"}}, "never mentions `draft`"),
        ({"evaluation": {"dataset": "x.jsonl", "temperature": -1}}, "`evaluation.temperature` must be at least 0"),
        ({"training": {"eval_strategy": "steps"}}, r"r\.yaml:\d+: `training.eval_strategy` belongs to the loop"),
    ],
)
def test_bad_input_is_named_before_any_work(sorting, tmp_path, capsys, changes, message):
    refused(sorting, tmp_path, capsys, changes, message)


@pytest.mark.parametrize("listed", [False, True])
def test_a_policy_is_not_a_reward_model(sorting, tmp_path, capsys, listed):
    scorer = {"reward_model": str(sorting / "model")}
    scores = {"scorers": [{"verifier": "recipes/quickstart/verifier.py:exact_match"}, scorer]} if listed else scorer
    refused(sorting, tmp_path, capsys, {"scores": scores}, r"r\.yaml:\d+: `scores\S*\.reward_model`: .*has 2 outputs")


def test_a_prompt_that_cannot_be_shared(sorting, tmp_path, capsys):
    """Where a recipe asks for it."""
    model = {**recipe(sorting, tmp_path)["model"], "attn_implementation": "flash_attention_2"}
    training = {"trainer": "tdpo", "share_prompt": True, **ON_CPU}
    message = r"r\.yaml:\d+: `training`: `share_prompt: true` is not supported here: `attn_implementation='flash_att"
    refused(sorting, tmp_path, capsys, {"model": model, "training": training}, message)


def test_a_batch_that_cannot_be_parted(sorting, tmp_path, capsys):
    training = {"trainer": "tdpo", "max_batch_tokens": 100, "loss_type": ["sigmoid", "sft"], **ON_CPU}
    message = r"r\.yaml:\d+: `training`: `max_batch_tokens=100` is not supported with `loss_type=\['sft'\]`"
    refused(sorting, tmp_path, capsys, {"training": training}, message)


def refused(sorting, tmp_path, capsys, changes, message):
    """By the command line in this process, whose stages are all forked from one server."""
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(recipe(sorting, tmp_path / "run", **changes)))
    assert main(["aries", "run", str(file)]) == 2
    printed = capsys.readouterr().err
    assert re.search("error: .*" + message, printed.replace("\n", " ")), printed
    assert "Traceback" not in printed
    assert not list((tmp_path / "run").glob("round_*/*")), "nothing was made"
