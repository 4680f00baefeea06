"""
One file of prompts answered on a Ray cluster of two nodes on this machine, a node of which is killed in the middle.

    python tests/aries/ray_run.py JOB

In: the JSON of `prompts`, `answers`, `model`, `kill_after` (answered chains) and `turns`. Out: the answers, and `notes` beside them. In a
process of its own, as in a run, since Ray keeps threads and files open.
"""

import json
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import psutil
from ray.cluster_utils import Cluster

from trl_ext.aries.config import DraftsConfig, GenerationConfig, RefinementsConfig
from trl_ext.aries.generation.chains import EngineSettings, Task, answer_task
from trl_ext.aries.generation.ray_engine import RayEngine
from trl_ext.aries.generation.refinements import Strategy


def main(job: dict) -> None:
    strategy = Strategy(RefinementsConfig(turns=job["turns"], template="{{ question }} Draft : {{ draft }} ."))
    sampling = [DraftsConfig(temperature=1.0, max_tokens=8)] * job["turns"]
    task = Task(Path(job["prompts"]), Path(job["answers"]), strategy, sampling, (0, 1))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    config = GenerationConfig(
        engine="ray",
        ray_address=cluster.address,
        ray_workers=2,
        max_model_len=64,
        max_num_seqs=4,
        dtype="float32",
        cpu_kv_cache_gib=1,
    )
    notes: list[str] = []
    engine = RayEngine(EngineSettings(job["model"], config), notes.append)
    while len(engine._ready()) < 2:
        engine._collect()
    used = set()

    def progress(done: int) -> None:
        nonlocal second
        used.update(place.number for place in engine._places if place.sent)
        if done >= job["kill_after"] and second is not None:
            cluster_node, second = second, None
            # As a machine that fails: its workers too, which would otherwise go on until they miss their raylet
            raylets = cluster_node.all_processes["raylet"]
            workers = [w for raylet in raylets for w in psutil.Process(raylet.process.pid).children(recursive=True)]
            cluster.remove_node(cluster_node, allow_graceful=False)
            for worker in workers:
                with suppress(psutil.NoSuchProcess):
                    worker.kill()

    with closing(engine):
        answer_task(engine, task, progress)
        # The lost worker's place is taken as soon as there is room for it
        cluster.add_node(num_cpus=1)
        start = time.monotonic()
        while len(engine._ready()) < 2 and time.monotonic() - start < 900:
            engine._collect()
        result = {"notes": notes, "used": sorted(used), "ready": len(engine._ready())}
    Path(job["answers"] + ".notes").write_text(json.dumps(result))
    cluster.shutdown()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
