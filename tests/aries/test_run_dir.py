import json
from dataclasses import replace
from pathlib import Path

import pytest

from trl_ext.aries.config import (
    AriesConfig,
    EvaluationConfig,
    GenerationConfig,
    JudgeConfig,
    PairsConfig,
    PromptsConfig,
    ScorerConfig,
    ScoresConfig,
)
from trl_ext.aries.manifest import write_manifest
from trl_ext.aries.records import sha256
from trl_ext.aries.run_dir import RunDir, is_locked
from trl_ext.recipe import RecipeError


@pytest.fixture
def config(tmp_path):
    return AriesConfig(
        output_dir=str(tmp_path / "run"),
        model={"model_name_or_path": "m"},
        prompts=PromptsConfig("p.jsonl", per_round=10),
        evaluation=EvaluationConfig("e.jsonl"),
        training={"trainer": "tdpo", "learning_rate": 1e-6},
        scores=ScoresConfig(verifier="v.py:f"),
    )


def enter(config, works: bool = True, **inputs):
    """Open the run directory, and, if the run works, make a file of its first round there."""
    run_dir = RunDir(Path(config.output_dir))
    with run_dir.opened(config, "recipe: text\n", inputs):
        if works:
            run_dir.round(1).path.mkdir(exist_ok=True)
            run_dir.round(1).prompts.touch()


def test_a_run_that_made_nothing_takes_the_corrected_recipe(config):
    """As when the check of the settings refused it."""
    enter(config, works=False)
    enter(replace(config, rounds=2), works=False)
    assert json.loads(RunDir(Path(config.output_dir)).resolved.read_text())["rounds"] == 2
    enter(config)
    with pytest.raises(RecipeError, match="rounds: 3 -> 2"):
        enter(replace(config, rounds=2))


def test_the_recipe_and_what_it_resolved_to_are_kept(config):
    enter(config)
    run_dir = RunDir(Path(config.output_dir))
    assert run_dir.recipe.read_text() == "recipe: text\n"
    resolved = json.loads(run_dir.resolved.read_text())
    assert resolved["training"] == {"trainer": "tdpo", "learning_rate": 1e-6}
    assert resolved["refinements"]["turns"] == 4  # defaults too
    enter(config)  # the same recipe continues


def test_another_recipe_is_refused_with_what_differs_and_the_way_out(config):
    enter(config)
    other = replace(config, training={"trainer": "tdpo", "learning_rate": 1e-5}, pairs=PairsConfig(min_margin=0.5))
    with pytest.raises(RecipeError, match="training.learning_rate: 1e-06 -> 1e-05") as error:
        enter(other)
    assert "pairs.min_margin: 0.0 -> 0.5" in str(error.value)
    assert "output_dir" in str(error.value)


def test_other_data_under_the_same_name_is_refused(config):
    enter(config, data="a")
    with pytest.raises(RecipeError, match="inputs.data: 'a' -> 'b'"):
        enter(config, data="b")


def test_how_the_machine_is_used_may_change_and_the_directory_may_move(config):
    enter(config)
    Path(config.output_dir).rename(f"{config.output_dir}-moved")
    engine = GenerationConfig(max_num_seqs=8, gpu_memory_utilization=0.5)
    enter(replace(config, output_dir=f"{config.output_dir}-moved", generation=engine))


def test_more_rounds_continue_a_run_and_fewer_do_not(config):
    enter(config)
    enter(replace(config, rounds=5))
    with pytest.raises(RecipeError, match="rounds: 5 -> 3"):
        enter(config)


def test_more_rounds_are_refused_where_their_number_sizes_the_rounds(config):
    config = replace(config, prompts=PromptsConfig("p.jsonl"))
    enter(config)
    with pytest.raises(RecipeError, match="rounds: 3 -> 5"):
        enter(replace(config, rounds=5))


def test_a_run_of_an_earlier_version_continues_where_new_keys_are_at_their_defaults(config):
    """Keys that the earlier version did not have are missing from its file, whole sections and those of a judge included."""
    judged = [
        ScorerConfig(judge=JudgeConfig(base_url="http://localhost:8000/v1", model="m")),
        ScorerConfig(verifier="v.py:f", weight=2.0),
    ]
    config = replace(config, scores=ScoresConfig(scorers=judged))
    enter(config)
    file = RunDir(Path(config.output_dir)).resolved
    old = json.loads(file.read_text())
    del old["parity"], old["seed"], old["pairs"]["guard"], old["refinements"]["strategy"]
    del old["scores"]["scorers"][0]["judge"]["max_retries"], old["scores"]["scorers"][1]["batch_size"]
    file.write_text(json.dumps(old))
    with pytest.raises(RecipeError, match="settings or data:\n  pairs.min_margin: 0.0 -> 0.5\n  seed: 42 -> 7\nSet"):
        enter(replace(config, seed=7, pairs=PairsConfig(min_margin=0.5)))
    enter(config)
    assert json.loads(file.read_text()) == old, "the manifests hold its hash"


def test_what_it_was_made_with_is_unreadable(config):
    enter(config)
    file = RunDir(Path(config.output_dir)).resolved
    file.write_text('{"output_dir": "ru')
    with pytest.raises(RecipeError, match="resolved.json: not valid JSON .*another `output_dir`"):
        enter(config)


def test_one_process_at_a_time(config):
    run_dir = RunDir(Path(config.output_dir))
    with run_dir.opened(config, "", {}):
        assert is_locked(run_dir.lock)
        with pytest.raises(RecipeError, match="in use by another process"):
            enter(config)
    assert not is_locked(run_dir.lock)
    enter(config)


def test_an_unwritable_place_is_named(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="`output_dir`: cannot write to .*file/run"):
        enter(replace(config, output_dir=str(tmp_path / "file" / "run")))


def test_the_manifest_names_versions_and_hashes(config):
    enter(config, works=False)
    run_dir = RunDir(Path(config.output_dir))
    for number in (0, 1):
        round_dir = run_dir.round(number)
        round_dir.path.mkdir()
        round_dir.pairs.write_text("{}\n")
        round_dir.drops.write_text('{"pairs": 1, "dropped": {"no_margin": 2}}')
        write_manifest(run_dir, config, number)
    manifest = json.loads(round_dir.manifest.read_text())
    assert manifest["parent"] == {"round": 0, "manifest_sha256": sha256(run_dir.round(0).manifest)}
    assert manifest["dropped"] == {"no_margin": 2}
    assert manifest["sha256"] == {"pairs.jsonl": sha256(round_dir.pairs)}
    assert manifest["recipe_sha256"] == sha256(run_dir.resolved)
    assert {"trl-ext", "trl", "torch", "transformers"} <= set(manifest["versions"])
