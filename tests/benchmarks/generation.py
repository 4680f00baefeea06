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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from trl_ext.aries.config import DraftsConfig, GenerationConfig, RefinementsConfig
from trl_ext.aries.data.records import Chain
from trl_ext.aries.generation.chains import EngineSettings, Task, run_chains
from trl_ext.aries.generation.drafts import encode_prompt
from trl_ext.aries.generation.embedded_engine import EmbeddedEngine
from trl_ext.aries.generation.refinements import Strategy

from .steps import Shape, argument_parser, environment, write


# Thin and deep: a step costs nearly as much for few requests as for many, as on a GPU
MODEL = Shape(vocabulary=2048, hidden=64, layers=12, pairs=0, head_size=32)
TURNS = 4
GREEDY = DraftsConfig(temperature=0.0, max_tokens=1)  # the workload says how long an answer is
CHAINS, TURN_BY_TURN, ONE_CALL = "chain driver", "turn by turn", "one call"


@dataclass
class Workload:
    """How long questions are, and how uneven answers: tokens of an answer are log-normal, cut at `longest`."""

    sigma: float
    longest: int = 400
    question: int = 140  # a block of the prefix cache, 128 tokens on a CPU, and some
    median: int = 12
    chains: int = 0

    @property
    def answers(self) -> str:
        return f"log-normal, sigma {self.sigma:g}, at most {self.longest}" if self.sigma else "equal"

    def tokens(self, name: tuple[Any, ...]) -> int:
        """Length of a request's answer, the same in every schedule."""
        drawn = random.Random("/".join(map(str, name))).lognormvariate(math.log(self.median), self.sigma)
        return min(max(round(drawn), 1), self.longest)

    def prompts(self) -> list[str]:
        generator = random.Random(0)
        words = [f"w{i}" for i in range(3, MODEL.vocabulary)]
        return [" ".join(generator.choices(words, k=self.question)) for _ in range(self.chains)]


class FixedLengths(EmbeddedEngine):
    """The embedded engine, with answers as long as the workload says. It counts its steps and keeps the requests."""

    def __init__(self, model: Path, slots: int):
        config = GenerationConfig(max_model_len=2048, max_num_seqs=slots, dtype="float32", cpu_kv_cache_gib=1)
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
        self.steps, self.requests = 0, []

    def request_settings(self, sampling: DraftsConfig, name: tuple[Any, ...]) -> dict[str, Any]:
        settings = super().request_settings(sampling, name)
        return settings | {"max_tokens": self.workload.tokens(name), "ignore_eos": True, "stop_token_ids": []}

    def request_params(self, name: tuple[Any, ...]) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(**self.request_settings(GREEDY, name), output_kind=RequestOutputKind.FINAL_ONLY)

    @property
    def strategy(self) -> Strategy:
        return self._task.strategy

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer


def in_chains(engine: FixedLengths, workload: Workload, slots: int) -> None:
    """The chain driver; afterwards the engine has the requests, in the order in which they ended."""
    chains = [Chain(str(i), prompt) for i, prompt in enumerate(workload.prompts())]
    finished: list[Chain] = []
    run_chains(engine, chains, slots, lambda chains: None, finished.append)
    assert all(len(chain.answers) == TURNS for chain in finished) and len(finished) == workload.chains


def turn_by_turn(engine: FixedLengths, workload: Workload) -> None:
    """A loop over turns: it renders and tokenizes the prompts of a turn, has them answered by one `LLM.generate`, and goes on."""
    chains = [Chain(str(i), prompt) for i, prompt in enumerate(workload.prompts())]
    for _ in range(TURNS):
        requests = [engine.strategy.next_request(chain) for chain in chains]
        names = [(chain.prompt_id, request.turn) for chain, request in zip(chains, requests, strict=True)]
        prompts = [encode_prompt(engine.tokenizer, request.prompt) for request in requests]
        outputs = generate(engine, prompts, [engine.request_params(name) for name in names])
        for chain, request, output in zip(chains, requests, outputs, strict=True):
            [answer] = output.outputs
            engine.strategy.add(chain, request, answer.text, len(answer.token_ids), answer.finish_reason)


def generate(engine: FixedLengths, prompts: list[list[int]], params: list[Any]) -> list[Any]:
    return engine.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


def measure(engine: FixedLengths, workload: Workload, slots: int, repeats: int) -> list[dict[str, Any]]:
    """One row per schedule; they take turns, after a pass of the chain driver that records the requests."""
    engine.workload = workload
    task = Task(Path(), Path(), Strategy(RefinementsConfig(turns=TURNS)), [GREEDY] * TURNS, (0,))
    engine.start(task)
    in_chains(engine, workload, slots)
    cached = engine.cached_tokens / engine.prompt_tokens
    requests = sorted(engine.requests, key=lambda request: [int(part) for part in request[0].split("/")])
    prompts = [ids for _, ids in requests]
    params = [engine.request_params(tuple(name.split("/"))) for name, _ in requests]
    schedules: dict[str, Callable[[], Any]] = {
        CHAINS: lambda: in_chains(engine, workload, slots),
        TURN_BY_TURN: lambda: turn_by_turn(engine, workload),
        ONE_CALL: lambda: generate(engine, prompts, params),
    }
    tokens = sum(p.max_tokens for p in params)
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
            "question": workload.question,
            "answers": workload.answers,
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


WORKLOADS = (Workload(1.6, longest=800, question=16), Workload(1.3), Workload(0.5), Workload(0.0))
CHAINS_PER_SLOT = 8


def main() -> None:
    parser = argument_parser(__doc__, repeats=3)
    parser.add_argument("--slots", type=int, default=32, help="requests that the engine decodes together")
    args = parser.parse_args()
    text = (
        "`make bench` measures this: the same requests on one engine in three schedules, which take turns.\n\n"
        "- Chain driver: `trl_ext.aries.generation.chains.run_chains`.\n"
        "- Turn by turn: a loop over the four turns. It renders and tokenizes all prompts of a turn, and has `LLM.generate` answer them.\n"
        "- One call: all requests at once, tokenized before, as if no answer had to be waited for.\n\n"
        f"Answers have seeded lengths, log-normal with a median of {Workload.median} tokens. `question` is the tokens of a prompt without its template "
        "and draft; `slots` requests are decoded together. `step ratio` and `speed ratio` compare with turn by turn, the latter by the process's "
        "CPU time, as the median over the repeats. `prefix hits` is the share of prompt tokens from the prefix cache. On a CPU a step takes longer "
        "the more requests it holds, so the speed ratio is below the step ratio. If a step takes as long for few requests as for many, as when a "
        "large model decodes on a GPU, the two are equal.\n\n" + environment("cpu", "fp32")
    )
    rows = []
    with tempfile.TemporaryDirectory() as path:
        save_model(Path(path))
        engine = FixedLengths(Path(path), args.slots)
        for workload in WORKLOADS:
            workload = replace(workload, chains=CHAINS_PER_SLOT * args.slots)
            rows += measure(engine, workload, args.slots, args.repeats)
            write(rows, args.output / "generation", "Chains beside a loop over turns", text)
            print(*rows[-3:], sep="\n", flush=True)


if __name__ == "__main__":
    main()
