import fcntl
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from trl_ext.aries import run_dir as run_dir_module
from trl_ext.aries.config import (
    AriesConfig,
    EvaluationConfig,
    GenerationConfig,
    JudgeConfig,
    PairsConfig,
    PromptsConfig,
    RefinementsConfig,
    ScorerConfig,
    ScoresConfig,
)
from trl_ext.aries.data.records import sha256
from trl_ext.aries.manifest import write_manifest
from trl_ext.aries.rounds import unknown_keys_first
from trl_ext.aries.run_dir import RunDir, is_locked, keep_templates
from trl_ext.recipe import Recipe, RecipeError, apply_overrides


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
    run = RunDir(Path(config.output_dir))
    run.overlap.touch()
    enter(replace(config, rounds=2), works=False)
    assert not run.overlap.exists(), "it was counted in the data of the other recipe"
    assert json.loads(RunDir(Path(config.output_dir)).resolved.read_text())["rounds"] == 2
    enter(config)
    with pytest.raises(RecipeError, match="rounds: 3 -> 2"):
        enter(replace(config, rounds=2))


def test_children_read_the_settings_of_now(config):
    """Some may change while a run goes on, and a key that an earlier version did not have is at its default."""
    enter(config)
    run_dir, skips = RunDir(Path(config.output_dir)), replace(config, pairs=PairsConfig(guard="skip"))
    enter(skips)
    assert run_dir.read_config() == skips
    recorded = json.loads(run_dir.resolved.read_text())
    del recorded["health"], recorded["generation"]["timeout"]
    run_dir.resolved.write_text(json.dumps(recorded))
    enter(skips)
    assert run_dir.read_config() == skips


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


def enter_with(config, inputs: dict):
    run_dir = RunDir(Path(config.output_dir))
    with run_dir.opened(config, "recipe: text\n", inputs):
        run_dir.round(1).path.mkdir(exist_ok=True)
        (run_dir.round(1).path / "prompts.jsonl").touch()


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ("abc", "def", "p.jsonl has changed since the run started .SHA-256 abc… -> def…"),
        ("abc", None, "p.jsonl no longer exists"),
        (None, "def", "p.jsonl is a file or a directory here now .SHA-256 def….*was not when the run started"),
    ],
)
def test_an_input_that_changed_is_named(config, before, now, message):
    enter_with(config, {"prompts.dataset": before})
    with pytest.raises(RecipeError, match=f"other settings or data:\n  prompts.dataset: {message}"):
        enter_with(config, {"prompts.dataset": now})


@pytest.mark.parametrize("made", [None, "round_00/manifest.json", "round_01/pairs.jsonl"])
def test_scorers_may_change_until_something_is_made_from_their_scores(config, made):
    """As a verifier is corrected that has failed on the first answers. What it has scored until then is scored again, and nothing else."""
    run = RunDir(Path(config.output_dir))
    enter_with(config, {"scores.verifier": "abc", "prompts.dataset": "abc"})
    run.round(0).path.mkdir()
    kept, scores = [run.round(1).answers, run.score_cache], [run.round(0).evaluation_scores, run.round(1).scores]
    for file in (*kept, *scores, *([run.path / made] if made else [])):
        file.touch()
    corrected = replace(
        config, scores=ScoresConfig(verifier="v.py:f", timeout=1.0), evaluation=EvaluationConfig("e.jsonl")
    )
    if made is None:
        with pytest.raises(RecipeError, match="data:\n  prompts.dataset: p.jsonl has changed .*\nSet"):
            enter_with(corrected, {"scores.verifier": "def", "prompts.dataset": "def"})
        enter_with(corrected, {"scores.verifier": "def", "prompts.dataset": "abc"})
        assert json.loads(run.resolved.read_text())["inputs"]["scores.verifier"] == "def"
    else:
        with pytest.raises(RecipeError, match="scores.verifier: v.py:f has changed"):
            enter_with(corrected, {"scores.verifier": "def", "prompts.dataset": "abc"})
    assert all(file.exists() for file in kept)
    assert [file.exists() for file in scores] == [made is not None] * 2


def test_how_one_of_several_scorers_is_asked_may_change(config):
    def scored(weight: float, timeout: float | None) -> AriesConfig:
        scorer = ScorerConfig(verifier="v.py:f", weight=weight, timeout=timeout)
        return replace(config, scores=ScoresConfig(scorers=[scorer]))

    enter(scored(1.0, timeout=None))
    RunDir(Path(config.output_dir)).round(1).pairs.touch()
    enter(scored(1.0, timeout=10.0))
    with pytest.raises(RecipeError, match=r"data:\n  scores.scorers\[0\].weight: 1.0 -> 2.0\nSet"):
        enter(scored(2.0, timeout=None))


def test_an_input_that_an_earlier_version_did_not_look_at_is_taken_as_it_is(config):
    enter_with(config, {"prompts.dataset": "abc"})
    enter_with(config, {"prompts.dataset": "abc", "model.model_name_or_path": "def"})


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("output_dir", ["", "  ", ".", "notes", "model", "model/run", "data", "recipe.yaml"])
def test_nothing_of_the_user_s_is_touched(output_dir, config, tmp_path, monkeypatch):
    """Empty, the working directory, a directory with other files, an input, a place inside one or around one, a file."""
    for name in ("recipe.yaml", "notes/todo.txt", "model/config.json", "data/prompts/p.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    inputs = {"model.model_name_or_path": Path("model"), "prompts.dataset": Path("data/prompts/p.jsonl")}
    with pytest.raises((RecipeError, ValueError), match="output_dir"):
        config = replace(config, output_dir=output_dir)
        RunDir(Path(config.output_dir)).check_free(inputs)
        enter(config)
    assert snapshot(tmp_path) == before


def test_what_is_no_run_s_is_refused_under_the_names_that_a_run_has(config):
    run = Path(config.output_dir)
    run.mkdir()
    for name, content, message in (
        ("recipe.yaml", "mine", "holds files that belong to no run .recipe.yaml"),
        ("resolved.json", '{"mine": 1}', "resolved.json does not hold a run's settings"),
    ):
        (run / name).write_text(content)
        with pytest.raises(RecipeError, match=message):
            enter(config)
        assert (run / name).read_text() == content
        (run / name).unlink()
    enter(config)


def test_the_empty_working_directory_is_not_taken_for_a_run_s(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="is the working directory. Name a directory"):
        enter(replace(config, output_dir="."))
    assert not list(tmp_path.iterdir())
    enter(config)
    monkeypatch.chdir(config.output_dir)
    enter(replace(config, output_dir="."))  # a run's own directory


def test_a_home_directory_is_written_as_the_shell_writes_it(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert replace(config, output_dir="~/runs/a").output_dir == str(tmp_path / "runs/a")


def test_a_directory_that_was_claimed_and_killed_is_claimed_again(config):
    run = Path(config.output_dir)
    run.mkdir()
    for name in ("run.lock", "resolved.json.tmp"):
        (run / name).touch()
    enter(config)
    (run / "recipe.yaml").unlink()  # killed between the two files
    enter(config)
    assert (run / "recipe.yaml").exists()


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


EARLIER_TEMPLATE = """\
{{ question }}

Here is a draft of an answer:

{{ draft }}

Write a better answer to the question: keep what is right in the draft, correct what is wrong, and add what is missing. \
Reply with the improved answer only."""


def test_a_run_keeps_the_default_template_that_it_was_begun_with(config):
    enter(replace(config, refinements=RefinementsConfig(template=EARLIER_TEMPLATE)))
    enter(kept := keep_templates(config))
    assert kept.refinements.template == EARLIER_TEMPLATE
    named = replace(config, refinements=RefinementsConfig(template="{{ draft }}"))
    assert keep_templates(named).refinements.template == "{{ draft }}", "what a recipe names is what it means"
    elsewhere = replace(config, output_dir="nowhere", refinements=RefinementsConfig())
    assert keep_templates(elsewhere).refinements.template == RefinementsConfig().template


def test_a_template_that_was_no_default_is_not_kept(config):
    enter(replace(config, refinements=RefinementsConfig(template="{{ draft }}")))
    with pytest.raises(RecipeError, match="refinements.template"):
        enter(keep_templates(config))


def test_what_it_was_made_with_is_unreadable(config):
    enter(config)
    file = RunDir(Path(config.output_dir)).resolved
    file.write_text('{"output_dir": "ru')
    with pytest.raises(RecipeError, match="resolved.json: not valid JSON .*another `output_dir`"):
        enter(config)


def test_one_process_at_a_time(config, monkeypatch):
    monkeypatch.setattr(run_dir_module, "SECONDS_OF_A_LOOK", 0)
    run_dir = RunDir(Path(config.output_dir))
    with run_dir.opened(config, "", {}):
        assert is_locked(run_dir.lock)
        with pytest.raises(RecipeError, match="in use by another process"):
            enter(config)
    assert not is_locked(run_dir.lock)
    enter(config)


def test_a_run_starts_while_somebody_looks_at_it(config, monkeypatch):
    """`trl-ext aries status` holds the lock, shared, while it asks for it; here until the run has tried once."""
    enter(config)
    look = open(RunDir(Path(config.output_dir)).lock)
    fcntl.flock(look, fcntl.LOCK_SH)
    waits = []
    monkeypatch.setattr(run_dir_module.time, "sleep", lambda seconds: (waits.append(seconds), look.close()))
    enter(config)
    assert len(waits) == 1


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


def test_a_misspelt_key_of_a_begun_run(config):
    """The sections that are TRL's are mappings here. A changed setting stays one."""
    enter(config)
    recipe = {key: value for key, value in asdict(config).items() if key in ("output_dir", "model", "training")}
    for key, said in (
        ("learning_rat", "command line: unknown key `learning_rat` in `training`. Did you mean `learning_rate`?"),
        ("beta", r"was made with other settings or data:\n  training.beta: None -> 0.5"),
    ):
        changed = apply_overrides(Recipe(None, recipe, {}), [f"--training.{key}=0.5"])
        with pytest.raises(RecipeError, match=said):
            with unknown_keys_first(changed_config := replace(config, training=changed.at("training")), changed):
                enter(changed_config)
