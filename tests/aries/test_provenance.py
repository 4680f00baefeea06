"""
What a run has made is what it goes on with. A run directory is written by hand, closed by the package's own manifest, and then changed in
every way that matters.
"""

import shutil
from pathlib import Path

import pytest
import yaml
from tests.aries.tiny_run import recipe

from trl_ext.aries.config import AriesConfig
from trl_ext.aries.data.records import read_json, sha256, write_json
from trl_ext.aries.manifest import write_manifest
from trl_ext.aries.provenance import check_made, check_policy, note_made
from trl_ext.aries.run_dir import RunDir
from trl_ext.cli import main
from trl_ext.recipe import RecipeError, load_yaml, parse_section


@pytest.fixture
def run(sorting, tmp_path) -> tuple[RunDir, AriesConfig]:
    """Rounds 0 and 1 of 3 are closed; round 2 is trained and not evaluated yet."""
    file = tmp_path / "r.yaml"
    file.write_text(
        yaml.safe_dump(
            recipe(
                sorting, tmp_path / "run", rounds=3, prompts={"dataset": str(sorting / "train.jsonl"), "per_round": 8}
            )
        )
    )
    config = parse_section(load_yaml(file), AriesConfig)
    run = RunDir(Path(config.output_dir))
    run.path.mkdir()
    write_json(run.resolved, {})
    run.evaluation_prompts.write_text("{}\n")
    for number in range(3):
        round_dir = run.round(number)
        round_dir.adapter.mkdir(parents=True)
        (round_dir.adapter / "adapter_model.safetensors").write_text(f"of round {number}")
        for path in (round_dir.prompts, round_dir.answers, round_dir.scores, round_dir.pairs):
            path.write_text(f"of round {number}\n")
        note_made(run, config.rounds)
        if number < 2:
            for path in (round_dir.evaluation, round_dir.evaluation_scores, round_dir.metrics):
                path.write_text(f"of round {number}\n")
            write_manifest(run, config, number)
    return run, config


def test_what_was_made_is_noted_until_the_manifest_has_it(run):
    run, config = run
    assert not run.round(0).made.exists() and not run.round(1).made.exists()
    noted = read_json(run.round(2).made)
    assert noted == {
        path.name: sha256(path)
        for path in (
            run.round(2).prompts,
            run.round(2).answers,
            run.round(2).scores,
            run.round(2).pairs,
            run.round(2).adapter,
        )
    }
    assert "evaluation_prompts.jsonl" in read_json(run.round(0).manifest)["sha256"]
    check_made(run, config)


@pytest.mark.parametrize(
    ("file", "can_be_made_again"),
    [
        ("round_02/adapter/adapter_model.safetensors", True),
        ("round_01/adapter/adapter_model.safetensors", False),
        ("round_00/adapter/adapter_model.safetensors", False),
        ("round_02/pairs.jsonl", True),
        ("round_01/evaluation_scores.jsonl", False),
        ("round_01/metrics.json", False),
        ("round_00/manifest.json", False),
        ("evaluation_prompts.jsonl", False),
    ],
)
def test_a_file_that_was_replaced_is_named(run, file, can_be_made_again):
    run, config = run
    (run.path / file).write_text('{"sha256": {}}')
    place = file.removesuffix("/adapter_model.safetensors")
    with pytest.raises(RecipeError, match=f"{place} is not what the run made in round") as error:
        check_made(run, config)
    assert (f"delete {run.path / place}" in str(error.value)) == can_be_made_again


def test_what_is_gone(run):
    """A policy that is needed stops the run; what an open round can make again does not, and is then another file."""
    run, config = run
    run.round(2).pairs.unlink()
    check_made(run, config)
    note_made(run, config.rounds)
    run.round(2).pairs.write_text("made again\n")
    note_made(run, config.rounds)
    check_made(run, config)
    run.round(1).answers.unlink()  # of a closed round, and nobody reads them
    check_made(run, config)
    shutil.rmtree(run.round(1).adapter)
    with pytest.raises(RecipeError, match="round_01/adapter is missing"):
        check_made(run, config)


def test_a_policy_that_nobody_needs_may_be_deleted(run):
    """Once round 2 is closed, that of round 1 is read no more."""
    run, config = run
    for path in (run.round(2).evaluation, run.round(2).evaluation_scores, run.round(2).metrics):
        path.write_text("of round 2\n")
    write_manifest(run, config, 2)
    shutil.copytree(run.round(2).adapter, run.round(3).adapter)
    note_made(run, config.rounds)
    shutil.copytree(run.round(3).adapter, run.round(3).set_aside / "adapter")
    shutil.rmtree(run.round(3).adapter)  # set aside as degenerate
    shutil.rmtree(run.round(1).adapter)
    with pytest.raises(RecipeError, match="round_01/adapter is missing"):
        check_policy(run, config, 1)
    (run.round(3).set_aside / "adapter" / "adapter_model.safetensors").write_text("of somebody else")
    with pytest.raises(RecipeError, match="round_03/set_aside/adapter is not what the run made in round 3"):
        check_made(run, config)


@pytest.mark.parametrize(
    ("action", "file"), [("pairs", "round_02/pairs.jsonl"), ("answers", "round_01/evaluation.jsonl")]
)
def test_what_is_handed_on_is_the_run_s_own(run, tmp_path, capsys, action, file):
    run, _ = run
    (run.path / file).write_text("of somebody else\n")
    options = ["--config", str(tmp_path / "r.yaml"), "--output", str(tmp_path / "new")]
    assert main(["aries", action, *options]) == 2
    assert f"{run.path / file} is not what the run made" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "new").exists()


def test_another_adapter_of_the_same_shape_does_not_train_on(run, tmp_path, capsys):
    """As it is met: by the command line, before a model is loaded."""
    run, _ = run
    file = tmp_path / "r.yaml"
    config = parse_section(load_yaml(file), AriesConfig)
    run.resolved.unlink()
    kept = run.path.rename(tmp_path / "kept")
    with run.opened(config, file.read_text(), {}):
        pass
    shutil.copytree(kept, run.path, dirs_exist_ok=True)
    (run.round(1).adapter / "adapter_model.safetensors").write_text("of round 2")
    assert main(["aries", "run", "--config", str(file)]) == 2
    assert f"{run.round(1).adapter} is not what the run made in round 1" in capsys.readouterr().err.replace("\n", " ")
    assert not list(run.path.glob("logs/check*"))
