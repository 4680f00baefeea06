"""
What a round of ARIES costs besides generation and training: `make bench`. Writes `docs/benchmarks/orchestrator.csv` and `.md`.

One real round on the quickstart's task: real vLLM, real TRL, and the stages between them timed one by one.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from trl_ext.aries.config import AriesConfig
from trl_ext.aries.inputs import input_hashes, local_inputs, read_inputs
from trl_ext.aries.rounds import Rounds
from trl_ext.recipe import export_env, load_yaml, parse_section

from .steps import argument_parser, environment, write


ROOT = Path(__file__).parents[2]
STAGES = ("generate", "check_parity", "score", "close", "pair", "guard", "train")
WORK = ("generate", "train")  # what a round is for, their processes' starts included


class TimedRounds(Rounds):
    """The loop, with the seconds of each stage."""

    def __init__(self, config, inputs):
        super().__init__(config, inputs)
        self.seconds = dict.fromkeys(STAGES, 0.0)
        for name in STAGES:
            setattr(self, name, self._timed(name, getattr(self, name)))

    def _timed(self, name, stage):
        def timed(*args):
            start = time.perf_counter()
            stage(*args)
            self.seconds[name] += time.perf_counter() - start

        return timed


def recipe(directory: Path, prompts: int) -> dict:
    """The quickstart's, for one round of this many prompts; a score in shares, so that nearly every chain gives a pair."""
    settings = yaml.safe_load((ROOT / "recipes" / "quickstart" / "aries.yaml").read_text(encoding="utf-8"))
    settings |= {"output_dir": str(directory / "run"), "rounds": 1}
    settings["model"]["model_name_or_path"] = str(directory / "model")
    settings["prompts"] = {"dataset": str(directory / "train.jsonl"), "per_round": prompts}
    settings["sft"] |= {"dataset": str(directory / "sft.jsonl"), "max_steps": 100}
    settings["scores"] = {"verifier": "recipes/quickstart/verifier.py:partial_match"}
    settings["training"]["num_train_epochs"] = 1
    settings["evaluation"]["dataset"] = str(directory / "eval.jsonl")
    return settings


def measure(directory: Path, prompts: int) -> list[dict]:
    """A row per stage of round 1."""
    prepare = [sys.executable, "recipes/quickstart/prepare.py", "--output", str(directory)]
    subprocess.run([*prepare, "--train_size", str(prompts)], check=True, cwd=ROOT)
    file = directory / "aries.yaml"
    file.write_text(yaml.safe_dump(recipe(directory, prompts)), encoding="utf-8")
    config = parse_section(export_env(load_yaml(file)), AriesConfig)
    loop = TimedRounds(config, read_inputs(config))
    with loop.dir.opened(config, file.read_text(encoding="utf-8"), input_hashes(local_inputs(config, launch=None))):
        loop.sft()
        start = time.perf_counter()
        loop.round(1)
        total = time.perf_counter() - start
    overhead = total - sum(loop.seconds[name] for name in WORK)
    seconds = {
        **loop.seconds,
        "prompts and files": total - sum(loop.seconds.values()),
        "all but generate and train": overhead,
    }
    seconds["round"] = total
    return [
        {"prompts": prompts, "stage": name, "seconds": round(value, 2), "share": f"{value / total:.1%}"}
        for name, value in seconds.items()
    ]


def main() -> None:
    parser = argument_parser(__doc__, repeats=1)
    parser.add_argument("--prompts", type=int, default=10_000)
    args = parser.parse_args()
    measured = []
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as directory:
            measured.append(measure(Path(directory), args.prompts))
    rows = sorted(measured, key=lambda stages: stages[-1]["seconds"])[len(measured) // 2]
    text = (
        "`make bench` measures this: one round of the loop on the quickstart's task, with real vLLM and real training, on "
        f"{args.prompts:,} prompts with four answers each and 500 evaluation prompts, for one epoch. With models this small the stages around "
        "generation and training take their largest share. `generate` and `train` are the processes that hold the policy, "
        "`check_parity` loads it once more to compare log-probabilities, and `close` writes metrics and report. The rest runs in the "
        "loop's own process. [scale.md](scale.md) has a million prompts, without a model.\n\n"
        + environment("cpu", "fp32")
    )
    write(rows, args.output / "orchestrator", "A round of ARIES, stage by stage", text)
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()
