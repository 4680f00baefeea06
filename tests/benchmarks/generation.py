"""
What chains without barriers are worth: `make bench`. Writes `docs/benchmarks/generation.csv` and `.md`.

The same requests in three schedules on one engine: the chain driver; a call of vLLM's `LLM.generate` for each turn, as a loop over
turns does it; and all requests in one call, as if no answer had to be waited for, which is what the engine can do at most.
"""

import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from trl_ext.aries.chains import EngineSettings, Task, run_chains
from trl_ext.aries.config import DraftsConfig, GenerationConfig, RefinementsConfig
from trl_ext.aries.engine import EmbeddedEngine
from trl_ext.aries.records import Chain
from trl_ext.aries.refinements import Strategy

from .steps import Shape, argument_parser, environment, write


# Thin and deep: a step costs nearly as much for few requests as for many, as on a GPU
MODEL = Shape(vocabulary=2048, hidden=64, layers=12, pairs=0, head_size=32)
QUESTION_TOKENS = 140  # a block of the prefix cache, 128 tokens on a CPU, and some
TURNS = 4
CHAINS, TURN_BY_TURN, ONE_CALL = "chain driver", "turn by turn", "one call"


@dataclass
class Workload:
    """Chains, and how uneven their answers are: tokens of an answer are log-normal, cut at `longest`."""

    chains: int
    sigma: float
    median: int = 12
    longest: int = 400

    def tokens(self, name: tuple[Any, ...]) -> int:
        """Length of a request's answer, the same in every schedule."""
        drawn = random.Random(repr(name)).lognormvariate(math.log(self.median), self.sigma)
        return min(max(round(drawn), 1), self.longest)

    def prompts(self) -> list[str]:
        generator = random.Random(0)
        words = [f"w{i}" for i in range(3, MODEL.vocabulary)]
        return [" ".join(generator.choices(words, k=QUESTION_TOKENS)) for _ in range(self.chains)]


class FixedLengths(EmbeddedEngine):
    """The embedded engine, with answers as long as the workload says. It counts its steps and keeps the requests."""

    def __init__(self, model: Path, slots: int):
        config = GenerationConfig(max_model_len=1024, max_num_seqs=slots, dtype="float32", cpu_kv_cache_gib=1)
        super().__init__(EngineSettings(str(model), config))
        step = self._engine.step

        def counted():
            self.steps += 1
            outputs = step()
            self.requests += [(o.request_id, list(o.prompt_token_ids)) for o in outputs if o.finished]
            return outputs

        self._engine.step = counted

    def start(self, task: Task) -> None:
        super().start(task)
        self.llm.reset_prefix_cache()
        self.steps, self.requests, self.params = 0, [], {}

    def request_settings(self, sampling: DraftsConfig, name: tuple[Any, ...]) -> dict[str, Any]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        settings = super().request_settings(sampling, name)
        settings |= {"max_tokens": self.workload.tokens(name), "ignore_eos": True, "stop_token_ids": []}
        self.params["/".join(map(str, name))] = SamplingParams(**settings, output_kind=RequestOutputKind.FINAL_ONLY)
        return settings


def in_chains(engine: FixedLengths, workload: Workload, slots: int) -> None:
    """The chain driver; afterwards the engine has the requests, in the order in which they ended."""
    chains = [Chain(str(i), prompt) for i, prompt in enumerate(workload.prompts())]
    finished: list[Chain] = []
    run_chains(engine, chains, slots, lambda chains: None, finished.append)
    assert all(len(chain.answers) == TURNS for chain in finished) and len(finished) == workload.chains


def in_calls(engine: FixedLengths, calls: list[list[tuple[list[int], Any]]]) -> None:
    """`LLM.generate`, once for each list of requests."""
    for requests in calls:
        prompts = [{"prompt_token_ids": ids} for ids, _ in requests]
        engine.llm.generate(prompts, [params for _, params in requests], use_tqdm=False)


def measure(engine: FixedLengths, workload: Workload, slots: int, repeats: int) -> list[dict[str, Any]]:
    """One row per schedule; they take turns, after a pass of the chain driver that records the requests."""
    engine.workload = workload
    task = Task(
        Path(),
        Path(),
        Strategy(RefinementsConfig(turns=TURNS)),
        [DraftsConfig(temperature=0.0, max_tokens=1)] * TURNS,
        (0,),
    )
    engine.start(task)
    in_chains(engine, workload, slots)
    cached = engine.cached_tokens / engine.prompt_tokens
    params = engine.params
    order = sorted(range(len(engine.requests)), key=lambda i: [int(part) for part in engine.requests[i][0].split("/")])
    requests = [(name, ids, params[name]) for name, ids in (engine.requests[i] for i in order)]
    turns = [[(ids, p) for name, ids, p in requests if name.endswith(f"/{turn}")] for turn in range(1, TURNS + 1)]
    schedules: dict[str, Callable[[], None]] = {
        CHAINS: lambda: in_chains(engine, workload, slots),
        TURN_BY_TURN: lambda: in_calls(engine, turns),
        ONE_CALL: lambda: in_calls(engine, [[(ids, p) for _, ids, p in requests]]),
    }
    tokens = sum(p.max_tokens for *_, p in requests)
    seconds: dict[str, list[float]] = {name: [] for name in schedules}
    steps = {}
    for _ in range(repeats):
        for name, schedule in schedules.items():
            engine.start(task)
            start = time.process_time()
            schedule()
            seconds[name].append(time.process_time() - start)
            steps[name] = engine.steps
    return [
        {
            "chains": workload.chains,
            "slots": slots,
            "answers": "equal" if workload.sigma == 0 else f"log-normal, sigma {workload.sigma:g}",
            "schedule": name,
            "tokens": tokens,
            "steps": steps[name],
            "step ratio": round(steps[TURN_BY_TURN] / steps[name], 3),
            "tokens/CPU s": round(tokens / statistics.median(times)),
            "speed ratio": round(
                statistics.median(t / own for t, own in zip(seconds[TURN_BY_TURN], times, strict=True)), 3
            ),
            "prefix hits": f"{cached:.0%}" if name == CHAINS else "",
        }
        for name, times in seconds.items()
    ]


def save_model(path: Path) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(MODEL.config()).save_pretrained(path)
    MODEL.tokenizer().save_pretrained(path)


SIGMAS = (1.3, 0.5, 0.0)
CHAINS_PER_SLOT = 8


def main() -> None:
    parser = argument_parser(__doc__, repeats=3)
    parser.add_argument("--slots", type=int, default=32, help="requests that the engine decodes together")
    args = parser.parse_args()
    text = (
        "`make bench` measures this: the same requests on one engine in three schedules, which take turns. Chain driver: "
        "`trl_ext.aries.chains.run_chains`, templates and tokenization included. Turn by turn: a call of `LLM.generate` for "
        "each of the four turns. One call: all requests at once, as if no answer had to be waited for. Answers have seeded "
        f"lengths, log-normal with a median of {Workload.median} tokens and at most {Workload.longest}, prompts "
        f"{QUESTION_TOKENS} tokens and more; `slots` requests are decoded together. `step ratio` and `speed ratio` are to "
        "turn by turn, the latter by the process's CPU time, as the median over the repeats. On a CPU a step takes the "
        "longer the more requests it holds, so there the speed ratio is below the step ratio; where it takes as long for few as for many, as in the "
        "decoding of a large model on a GPU, the speed ratio is the step ratio. `prefix hits`: share of prompt tokens from the prefix "
        "cache.\n\n" + environment("cpu", "fp32")
    )
    rows = []
    with tempfile.TemporaryDirectory() as path:
        save_model(Path(path))
        engine = FixedLengths(Path(path), args.slots)
        for sigma in SIGMAS:
            rows += measure(engine, Workload(CHAINS_PER_SLOT * args.slots, sigma), args.slots, args.repeats)
            write(rows, args.output / "generation", "Chains beside a loop over turns", text)
            print(*rows[-3:], sep="\n", flush=True)


if __name__ == "__main__":
    main()
