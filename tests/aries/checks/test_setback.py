"""Rounds that got worse: what is decided, what the run goes on from, and that a kill at any moment changes nothing."""

import json
import subprocess
import time
from dataclasses import replace

import pytest
import yaml
from tests.aries.tiny_run import ON_CPU, command, recipe, results, run
from tests.made_run import make_run

from trl_ext.aries.checks.setback import decide_setback, discard_answers, discarded_tokens, rolled_back, stopped
from trl_ext.aries.config import AriesConfig, HealthConfig
from trl_ext.aries.data.records import Answer, Chain, read_json, write_json, write_jsonl
from trl_ext.aries.manifest import round_facts
from trl_ext.aries.policies import answering_round, base_round, learning_rate_factor, policy_after, start_policy
from trl_ext.aries.provenance import check_made, note_made
from trl_ext.aries.results.progress import RunProgress
from trl_ext.aries.results.state import chosen_round
from trl_ext.aries.results.status import print_next
from trl_ext.aries.rounds import Rounds
from trl_ext.aries.training.settings import training_of
from trl_ext.recipe import Recipe, RecipeError, parse_section


LOST = ["y1 loses"]
FILES = ["answers.jsonl", "scores.jsonl", "guard_scores.jsonl"]


@pytest.fixture
def loop(tmp_path):
    """A run of five rounds whose first two have been evaluated, and whose third has answers of the second's policy; with `on_setback`."""

    def make(on_setback: str, rounds: int = 5) -> Rounds:
        path = tmp_path / "run"
        if not path.exists():
            run = make_run(
                path, [[["a"]] * 8] * 3, [[[0.5]] * 8] * 3, rounds=rounds, settings={"refinements": {"turns": 2}}
            )
            for number in range(3):
                run.round(number).manifest.unlink()
            made = run.round(3)
            made.path.mkdir()
            chain = Chain(
                "p-0",
                "x",
                [Answer(1, "a", 3, "stop"), Answer(2, "b", 4, "stop")],
                unanswered=[Answer(3, "c", 5, "stop")],
            )
            write_jsonl(made.prompts, [{"prompt_id": "p-0", "prompt": "x"}])
            write_jsonl(made.answers, [chain.to_row()])
            for file in (made.scores, made.guard_scores):
                write_jsonl(file, [{"prompt_id": "p-0", "scores": [0.0, 1.0]}])
        run_config = json.loads((path / "resolved.json").read_text())
        config = AriesConfig(
            **{key: value for key, value in run_config.items() if key not in ("inputs", "health", "rounds")}
        )
        return Rounds(replace(config, health=HealthConfig(on_setback=on_setback), rounds=rounds), inputs=None)

    return make


@pytest.mark.parametrize(
    ("on_setback", "number", "found", "decision"),
    [
        ("warn", 2, LOST, "warned"),
        ("stop", 2, LOST, "stopped"),
        ("roll_back", 2, LOST, "rolled_back"),
        ("roll_back", 2, [], None),
        ("stop", 5, LOST, "warned"),  # nothing is left to stop
        ("roll_back", 5, LOST, "rolled_back"),  # for more rounds, if the run is given some
    ],
)
def test_decisions(loop, on_setback, number, found, decision):
    loop = loop(on_setback)
    loop.dir.round(number).path.mkdir(exist_ok=True)
    assert decide_setback(loop.dir, loop.config, number, found) == decision
    written = read_json(loop.dir.round(number).setback)
    assert written is None if decision is None else (written["decision"], written["setbacks"]) == (decision, found)


def test_a_skipped_round_has_no_setback_of_its_own(loop):
    loop = loop("roll_back")
    round_dir = loop.dir.round(2)
    round_dir.pairs.write_text("")
    write_json(round_dir.guard, {"decision": "skipped"})
    assert decide_setback(loop.dir, loop.config, 2, LOST) is None


def test_what_a_run_goes_on_from(loop):
    """Rounds 2 and 3 are rolled back, and the guard leaves round 4 out: 3, 4 and 5 start from 1, at rates of 1/2, 1/4 and 1/4."""
    loop = loop("roll_back")
    run, config = loop.dir, loop.config
    for number in (2, 3):
        decide_setback(run, config, number, LOST)
    skipped = run.round(4)
    skipped.path.mkdir()
    skipped.pairs.write_text("")
    write_json(skipped.guard, {"decision": "skipped"})
    assert [base_round(run, number) for number in range(1, 6)] == [0, 1, 1, 1, 4]
    assert [learning_rate_factor(run, number) for number in range(1, 6)] == [1, 1, 0.5, 0.25, 0.25]
    assert [answering_round(run, number) for number in range(5)] == [0, 1, 1, 1, 4]
    first = policy_after(run, config, 1)
    assert start_policy(run, config, 3) == start_policy(run, config, 5) == policy_after(run, config, 4) == first
    assert policy_after(run, config, 2) != first, "a round that is rolled back keeps its policy"
    training = training_of(run, config, 3)
    assert training.policy == training.reference == first and training.learning_rate_factor == 0.5
    for number in (1, 2):
        write_json(run.round(number).manifest, {})
    facts = round_facts(run, config, 3)
    assert (facts["started_from_round"], facts["learning_rate_factor"], facts["setback"]) == (1, 0.5, "rolled_back")
    assert "learning_rate_factor" not in round_facts(run, config, 2)


def test_what_earlier_rounds_give(loop):
    """A round that is rolled back gives its rows, and one that the guard skipped does not."""
    loop = loop("roll_back")
    run, config = loop.dir, replace(loop.config, pairs=replace(loop.config.pairs, earlier_rounds=2))
    assert training_of(run, loop.config, 3).earlier == training_of(run, config, 1).earlier == []
    assert training_of(run, config, 3).earlier == [run.round(1).pairs, run.round(2).pairs]
    decide_setback(run, config, 2, LOST)
    assert training_of(run, config, 3).earlier == [run.round(1).pairs, run.round(2).pairs]
    run.round(2).pairs.touch()
    write_json(run.round(2).guard, {"decision": "skipped"})
    assert training_of(run, config, 3).earlier == [run.round(1).pairs]


def test_a_last_round_that_is_rolled_back_is_not_the_result(loop, capsys):
    """Named, it can still be exported."""
    loop = loop("roll_back", rounds=2)
    run, config = loop.dir, loop.config
    assert chosen_round(run, config, None, [0, 1, 2], "finished") == 2
    decide_setback(run, config, 2, LOST)
    assert chosen_round(run, config, None, [0, 1, 2], "finished") == 1
    assert chosen_round(run, config, 2, [0, 1, 2], "finished") == chosen_round(run, config, None, [2], "finished") == 2
    assert rolled_back(run, config, 2) == "rolled back: the run's policy is that of round 1"
    print_next(run, config, RunProgress(2), "1 s")
    said = "".join(capsys.readouterr().out.split())
    assert f"Rolledbacktoround1.Thetrainedpolicyis{policy_after(run, config, 1).adapter}." in said
    assert str(run.round(1).evaluation) in said and str(run.round(2).path) not in said


class TestDiscardedAnswers:
    def test_they_are_moved_and_counted(self, loop):
        """3 + 4 + 5 tokens, the text without an answer included; a second look moves nothing."""
        loop = loop("roll_back")
        decide_setback(loop.dir, loop.config, 2, LOST)
        assert discarded_tokens(loop.dir, 3) == 12 and discarded_tokens(loop.dir, 2) == 0
        assert discard_answers(loop.dir, 2)
        made = loop.dir.round(3)
        assert sorted(path.name for path in made.rolled_back.iterdir()) == sorted(FILES)
        assert not any((made.path / name).exists() for name in FILES) and made.prompts.exists()
        made.answers.write_text("of the policy that goes on")
        assert not discard_answers(loop.dir, 2) and made.answers.exists()

    @pytest.mark.parametrize("on_setback", ["warn", "stop"])
    def test_only_if_rolled_back(self, loop, on_setback):
        loop = loop(on_setback)
        decide_setback(loop.dir, loop.config, 2, LOST)
        assert not discard_answers(loop.dir, 2) and loop.dir.round(3).answers.exists()
        assert not discard_answers(loop.dir, 1)

    @pytest.mark.parametrize("moved", [0, 1, 2, 3])
    def test_a_kill_between_any_two_moves(self, loop, moved):
        """
        The next start notes what is there, and may make what is missing, before it comes to move the rest. In the end nothing of the lost
        policy is left, and the notes are of what is there.
        """
        loop = loop("roll_back")
        run, config, made = loop.dir, loop.config, loop.dir.round(3)
        note_made(run, config.rounds)
        decide_setback(run, config, 2, LOST)
        made.rolled_back.mkdir()
        if moved:  # they were taken from the notes before
            write_json(made.made, {name: value for name, value in read_json(made.made).items() if name not in FILES})
        for name in FILES[:moved]:
            (made.path / name).rename(made.rolled_back / name)

        def make_missing():
            """What generating and scoring do."""
            for name in FILES:
                if not (made.path / name).exists():
                    (made.path / name).write_text("again")
            note_made(run, config.rounds)

        check_made(run, config)
        note_made(run, config.rounds)
        make_missing()
        while discard_answers(run, 2):
            make_missing()
        assert {(made.path / name).read_text() for name in FILES} == {"again"}
        assert "again" not in {(made.rolled_back / name).read_text() for name in FILES}
        check_made(run, config)


def test_a_stopped_run_says_why_and_goes_on_with_another_setting(loop):
    stopping = loop("stop")
    assert decide_setback(stopping.dir, stopping.config, 2, LOST) == "stopped"
    message = str(stopped(stopping.dir, stopping.config, 2, LOST))
    assert "round 2" in message and LOST[0] in message and str(stopping.dir.round(1).adapter) in message
    for option in ("output_dir", "--health.on_setback roll_back", "--health.on_setback warn"):
        assert option in message
    rolling = loop("roll_back")
    assert decide_setback(rolling.dir, rolling.config, 2, LOST) == "rolled_back"
    with rolling.dir.opened(rolling.config, "recipe: text\n", {"evaluation.dataset": "abc123"}):
        pass


@pytest.mark.parametrize("scores", [{}, {"judge": {"base_url": "http://h/v1", "model": "m"}}])
def test_scores_that_do_not_compare_rounds_are_refused(scores):
    recipe = {
        "output_dir": "r",
        "model": {"model_name_or_path": "m"},
        "prompts": {"dataset": "p"},
        "evaluation": {"dataset": "e"},
        "scores": scores,
        "pairs": {"selection": "rule_based"},
        "health": {"on_setback": "stop"},
        "training": {},
    }
    with pytest.raises(RecipeError, match="`health.on_setback: stop`.*`evaluation.scores`"):
        parse_section(Recipe(None, recipe, {}), AriesConfig)
    recipe["evaluation"]["scores"] = {"verifier": "v.py:f"}
    parse_section(Recipe(None, recipe, {}), AriesConfig)


@pytest.mark.slow
@pytest.mark.vllm
def test_a_round_that_is_rolled_back_in_the_whole_loop(sorting, tmp_path):
    """
    What selects likes low digits, and what judges high ones, so the first round is a setback by construction. Stopped, the run
    goes on with `roll_back`: round 2 starts from the policy of round 0, which answers its prompts, at half the learning rate. The oracle of
    another run, killed as its answers are moved away, is this one: the same files.
    """
    (tmp_path / "verifier.py").write_text(
        'import re\n\n\ndef high(prompts, completions, **kwargs):\n    return [sum(map(int, re.findall("[0-9]", one[0]["content"]))) for one in completions]\n\n\n'
        "def low(prompts, completions, **kwargs):\n    return [-score for score in high(prompts, completions)]\n"
    )
    changes = {
        "scores": {"verifier": f"{tmp_path}/verifier.py:low"},
        "evaluation": {
            "dataset": str(sorting / "eval.jsonl"),
            "temperature": 1.0,
            "scores": {"verifier": f"{tmp_path}/verifier.py:high"},
        },
        "pairs": {"guard_samples": 0},
        "training": {"trainer": "dpo", **ON_CPU, "max_steps": 8, "learning_rate": 2e-2, "save_strategy": "no"},
        "health": {
            "max_kl": None,
            "max_dropped": None,
            "min_length": None,
            "min_diversity": None,
            "on_setback": "stop",
        },
    }
    file, output = tmp_path / "whole.yaml", tmp_path / "whole"
    file.write_text(yaml.safe_dump(recipe(sorting, output, **changes)))
    done = subprocess.run(command(file), capture_output=True, text=True)
    assert done.returncode == 2 and "the policy of round 1 has become worse" in done.stderr, done.stdout + done.stderr
    assert not (output / "round_01" / "manifest.json").exists()
    assert "stopped: round 1, setback" in run(file, "status")

    changes["health"]["on_setback"] = "roll_back"
    file.write_text(yaml.safe_dump(recipe(sorting, output, **changes)))
    printed = run(file)
    assert (
        "rolled back: the next round starts from the policy of round 0, with the learning rate times 0.5"
        in " ".join(printed.split())
    )
    assert "what selects is being exploited" in printed
    second = output / "round_02"
    manifest = read_json(second / "manifest.json")
    assert (manifest["started_from_round"], manifest["learning_rate_factor"]) == (0, 0.5)
    assert read_json(second / "cost.json")["generated_tokens"]["discarded"] > 0
    assert (second / "answers.jsonl").read_bytes() != (second / "rolled_back" / "answers.jsonl").read_bytes()
    rates = [read_json(output / f"round_0{n}" / "training" / "log_history.json")[0]["learning_rate"] for n in (1, 2)]
    assert rates[1] == rates[0] / 2

    killed_file, killed = tmp_path / "killed.yaml", tmp_path / "killed"
    killed_file.write_text(yaml.safe_dump(recipe(sorting, killed, **changes)))
    for moment in ("round_01/manifest.json", "round_02/rolled_back/answers.jsonl"):
        with open(tmp_path / "log", "a") as log:
            process = subprocess.Popen(command(killed_file), stdout=log, stderr=log)
        while not (killed / moment).exists():
            time.sleep(0.0002)
            assert process.poll() is None or (killed / moment).exists(), (tmp_path / "log").read_text()
        process.kill()
        process.wait()
    run(killed_file)
    assert results(killed) == results(output)
