"""
Requests on Ray of which one kills its worker, whichever has it, for ever: python tests/aries/ray_poison.py JOB

In: the JSON of `prompts`, `answers`, `model`, `turns`, and `poison`, the id of the request. Out: the answers, and `notes` beside them. Ray, its
processes and their deaths are real; the workers are the smallest that take requests, [`Echo`].
"""

import json
import os
import sys
from contextlib import closing
from pathlib import Path

from trl_ext.aries.config import DraftsConfig, GenerationConfig, RefinementsConfig
from trl_ext.aries.generation import ray_engine
from trl_ext.aries.generation.chains import EngineSettings, Finished, Task, answer_task
from trl_ext.aries.generation.refinements import Strategy


def main(job: dict) -> None:
    poison = job["poison"]

    class Echo:
        """A worker whose answer is the number of token ids; it finishes one request a call, the poison as soon as it has it."""

        def __init__(self, settings: EngineSettings):
            self.requests = []

        def dtype(self) -> str:
            return "float32"

        def work(self, requests: list) -> list[Finished]:
            self.requests += requests
            if any(request_id == poison for request_id, _, _ in self.requests):
                os._exit(1)
            request_id, token_ids, _ = self.requests.pop(0)
            return [Finished(request_id, f"{len(token_ids)}", [1], "stop", None, len(token_ids), 0)]

    ray_engine.Worker = Echo
    strategy = Strategy(RefinementsConfig(turns=job["turns"], template="{{ question }} Draft : {{ draft }} ."))
    sampling = [DraftsConfig(max_tokens=8)] * job["turns"]
    task = Task(Path(job["prompts"]), Path(job["answers"]), strategy, sampling, (0, 1))
    config = GenerationConfig(
        engine="ray", ray_workers=2, max_model_len=64, max_num_seqs=4, max_retries=job["max_retries"]
    )
    notes: list[str] = []
    with closing(ray_engine.RayEngine(EngineSettings(job["model"], config), notes.append)) as engine:
        answer_task(engine, task, lambda done: None)
    Path(job["answers"] + ".notes").write_text(json.dumps(notes))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
