"""What reaches a tracker, with the real TensorBoard and a real run. Oracle: the files of the run itself."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.aries.tiny_run import MINIMAL
from tests.made_run import make_run

from trl_ext.aries.config import AriesConfig, EvaluationConfig, PairsConfig, PromptsConfig, ScoresConfig
from trl_ext.aries.results.tracking import round_values, run_name, training_environment, training_name
from trl_ext.aries.run_dir import RunDir
from trl_ext.cli import main


def logged(directory: Path) -> EventAccumulator:
    events = EventAccumulator(str(directory))
    events.Reload()
    return events


@pytest.mark.vllm
def test_rounds_and_trainings_are_in_tensorboard(whole_run):
    run, printed = whole_run
    assert "were not tracked" not in printed
    rounds = logged(run / "tensorboard/rounds")
    for number in (0, 1, 2):
        metrics = json.loads((run / f"round_{number:02d}/metrics.json").read_text())
        for turn in metrics["turns"]:
            for key in ("score", "tokens", "distinct_2"):
                events = rounds.Scalars(f"aries/{key}/turn_{turn['turn']}")
                assert events[number].step == number
                assert events[number].value == pytest.approx(turn[key])
        kl = rounds.Scalars("aries/kl_to_initial")[number].value
        assert kl == pytest.approx(metrics["kl_to_initial"]["per_token"], abs=1e-7)
    drops = json.loads((run / "round_02/drops.json").read_text())
    assert [(event.step, event.value) for event in rounds.Scalars("aries/pairs")][-1] == (2, drops["pairs"])
    history = json.loads((run / "round_01/training/log_history.json").read_text())
    losses = {row["step"]: row["loss"] for row in history if "loss" in row}
    training = logged(run / "tensorboard/round_01").Scalars("train/loss")
    assert {event.step: event.value for event in training} == pytest.approx(losses)


def tracked(tmp_path, **training) -> tuple[RunDir, AriesConfig]:
    config = AriesConfig(
        output_dir=str(tmp_path / "my run"),
        model=MINIMAL["model"],
        prompts=PromptsConfig(dataset="a"),
        evaluation=EvaluationConfig(dataset="a"),
        scores=ScoresConfig(verifier="v.py:score"),
        pairs=PairsConfig(),
        training=training,
    )
    run = RunDir(Path(config.output_dir))
    run.path.mkdir(exist_ok=True)
    return run, config


def test_accuracy_is_the_share_of_right_answers(tmp_path):
    """8 of 10 are right: 0.8, as the report has it."""
    scores = [[1.0] * 2] * 8 + [[0.0] * 2] * 2
    run = make_run(tmp_path / "run", [[["a", "b"]] * 10] * 2, [[[0.0] * 2] * 10, scores])
    values = round_values(run, 1)
    assert values["aries/accuracy/turn_1"] == values["aries/score/turn_1"] == 0.8
    assert values["aries/win_rate_round_0/turn_1"] == 0.9


def test_a_training_that_is_started_again_continues_its_run(tmp_path):
    run, config = tracked(tmp_path, report_to=["wandb"])
    first, again = (training_environment(run, config, 2) for _ in range(2))
    assert first == again and first["WANDB_RESUME"] == "allow"
    assert training_name(run, config, 2) == first["WANDB_RUN_ID"] == f"{run_name(run)}-round_02"
    named = replace(config, training=config.training | {"run_name": "mine"})
    assert training_name(run, named, 2) == training_environment(run, named, 2)["WANDB_RUN_ID"] == "mine"
    assert first["WANDB_RUN_GROUP"] == run_name(run) and run_name(run).startswith("my-run-")
    other, _ = tracked(tmp_path / "..", report_to="wandb")
    assert run_name(other) != run_name(run)


@pytest.mark.parametrize("report_to", ["none", [], None, ["none"]])
def test_no_tracker_leaves_no_trace(tmp_path, report_to):
    run, config = tracked(tmp_path, report_to=report_to)
    assert training_environment(run, config, 1) == {} and training_name(run, config, 1) is None
    assert not run.tracking.exists()


def test_a_tracker_that_is_not_there_is_said_before_the_model(tmp_path, monkeypatch, capfd, tiny_model_dir):
    """swanlab is not installed here; a tracker that does not exist is not known."""
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    base = [
        "tdpo",
        "--model_name_or_path",
        str(tiny_model_dir),
        "--dataset_name",
        "pairs.jsonl",
        "--output_dir",
        "out",
    ]
    for name, message in (
        ("swanlab", "`report_to`: SwanLabCallback requires swanlab"),
        ("wandbb", "wandbb is not supported"),
    ):
        assert main([*base, "--use_cpu", "--bf16", "false", "--report_to", name]) == 2
        assert message in capfd.readouterr().err


@pytest.mark.vllm
def test_a_run_leaves_the_chat_template_as_it_was(whole_run, sorting):
    run, _ = whole_run
    templates = [
        directory / "chat_template.jinja" for directory in (run / "round_00/adapter", run / "round_02/adapter")
    ]
    assert {path.read_bytes() for path in templates} == {(sorting / "model/chat_template.jinja").read_bytes()}
