"""
Generation on servers. What servers do rarely, failing, hanging, coming back as another one, is a small HTTP server's; the answers, and who
gave them, are then known. The last tests are of real vLLM servers.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from tests.aries.model_server import ModelServer, answer, logp, serving, start, stop
from tests.aries.tiny_run import MINIMAL, command, recipe, results
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_ext.aries import served_engine
from trl_ext.aries.chains import EngineSettings, Task, answer_task
from trl_ext.aries.children import ChildError, run_child
from trl_ext.aries.config import AriesConfig, DraftsConfig, GenerationConfig, RefinementsConfig
from trl_ext.aries.drafts import encode_prompt, request_seed
from trl_ext.aries.records import read_jsonl, sha256, to_line
from trl_ext.aries.refinements import Strategy
from trl_ext.aries.served_engine import ServedEngine
from trl_ext.aries.servers import Wanted, WrongServer, check_servers
from trl_ext.aries.waits import retry_after
from trl_ext.recipe import Recipe, RecipeError, parse_section


SECRET = "sk-" + "S3cret" * 5
TEXTS = [{"token_ids": [1, 2, 3, 4, 5], "positions": [1, 2, 4]}, {"token_ids": [6, 5, 4], "positions": [2]}]


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Waits of hundredths of a second, and no proxy."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(served_engine, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(served_engine, "CHECK_SECONDS", 0.1)


@pytest.fixture
def adapter(tmp_path) -> Path:
    path = tmp_path / "run" / "round_01" / "adapter"
    path.mkdir(parents=True)
    (path / "adapter_model.safetensors").write_bytes(b"weights")
    return path


@pytest.fixture
def make_engine(tiny_model_path, tmp_path):
    """An engine on servers, whose probe is what `ModelServer` computes with the adapter at `probed`."""

    def make(*servers: ModelServer | str, adapter: Path | None = None, probed: Path | None = None, **options):
        def logps(path: Path | None) -> list[float]:
            tokens = [text["token_ids"][position] for text in TEXTS for position in text["positions"]]
            return [logp(i, None if path is None else str(path)) for i in tokens]

        others = {} if adapter is None else {"base": logps(None)}
        probe = {"dtype": "float32", "tolerance": 0.01, "texts": TEXTS}
        probe["logps"] = {"policy": logps(probed or adapter), **others}
        (tmp_path / "parity_probe.json").write_text(json.dumps(probe))
        urls = [server if isinstance(server, str) else server.url for server in servers]
        config = GenerationConfig(
            **{"max_model_len": 64, "base_urls": urls, "max_concurrency_per_server": 3} | options
        )
        named = None if adapter is None else ("round_01", 2, str(adapter))
        notes: list[str] = []
        settings = EngineSettings(tiny_model_path, config, named, max_lora_rank=8)
        engine = ServedEngine(settings, tmp_path / "parity_probe.json", notes.append)
        engine.notes = notes
        return engine

    return make


TEMPLATE = "{{ question }} {{ draft }}"


def write_task(directory: Path, count: int) -> Task:
    prompts = [{"prompt_id": str(i), "prompt": [{"role": "user", "content": f"Sort : {i}"}]} for i in range(count)]
    (directory / "prompts.jsonl").write_text("".join(map(to_line, prompts)))
    strategy = Strategy(RefinementsConfig(turns=2, template=TEMPLATE))
    sampling = [DraftsConfig(temperature=1.0, max_tokens=8)] * 2
    return Task(directory / "prompts.jsonl", directory / "answers.jsonl", strategy, sampling, (0, 1))


def expected_rows(task: Task, model: str) -> list[dict]:
    """The oracle: what `ModelServer` answers to every request of every chain."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = []
    for row in read_jsonl(task.prompts):
        [message] = row["prompt"]
        answers, question = [], message["content"]
        for turn in (1, 2):
            content = question if turn == 1 else f"{question} {answers[0]['text']}"
            ids = encode_prompt(tokenizer, [{"role": "user", "content": content}])
            text = answer(ids, request_seed(0, 1, row["prompt_id"], turn))
            answers.append({"turn": turn, "text": text, "tokens": 3, "finish_reason": "stop"})
        rows.append({"prompt_id": row["prompt_id"], "answers": answers, "stopped": None})
    return rows


def run_task(engine: ServedEngine, task: Task, on_finished=lambda done: None) -> list[dict]:
    with closing(engine):
        answer_task(engine, task, on_finished)
    return read_jsonl(task.answers)


def test_chains_are_spread_and_failed_requests_are_sent_again(make_engine, tiny_model_path, tmp_path):
    """Every fifth request fails on one server. Each is answered once, none is refused room, and no server has more than its share."""
    task = write_task(tmp_path, 30)
    with (
        serving(tiny_model_path, seconds=0.03) as sound,
        serving(tiny_model_path, seconds=0.03, fail=lambda n: 500 if n % 5 == 0 else 200) as failing,
    ):
        engine = make_engine(sound, failing)
        assert run_task(engine, task) == expected_rows(task, tiny_model_path)
        answered = sound.answered + failing.answered
        assert answered.total() == 60 and set(answered.values()) == {1}
        assert sound.answered.total() > 10 and failing.answered.total() > 10
        assert sound.most_active == 3 and failing.most_active <= 3
    assert engine.notes == [], "a server that is well when it is looked at was never lost"


def test_refinements_are_asked_for_where_the_draft_was(make_engine, tiny_model_path, tmp_path):
    """So that the prompt is in the prefix cache. As many chains as there is room for: nobody has to move."""
    task = write_task(tmp_path, 6)
    with serving(tiny_model_path, seconds=0.02) as a, serving(tiny_model_path, seconds=0.02) as b:
        rows = run_task(make_engine(a, b), task)
        assert rows == expected_rows(task, tiny_model_path)
        assert a.answered.total() == b.answered.total() == 6
        for server in (a, b):
            questions = {ids[:5] for ids, _ in server.answered}
            assert len(questions) == 3, "three drafts and their three refinements"


def test_a_server_dies_and_comes_back(make_engine, adapter, tiny_model_path, tmp_path):
    """
    Its chains go on elsewhere. What comes back at its address has lost the adapter, and is used once it has it again. Of the 120 answers,
    nothing is generated twice but what the dead server had in flight, 3 at most.
    """
    task = write_task(tmp_path, 60)
    with serving(tiny_model_path, seconds=0.01) as stays:
        dies = start(ModelServer(tiny_model_path, seconds=0.01))
        engine = make_engine(stays, dies, adapter=adapter)
        came_back = []

        def on_finished(done: int) -> None:
            if done == 10:
                stop(dies)
            if done == 30:
                came_back.append(start(ModelServer(tiny_model_path, port=dies.server_port, seconds=0.01)))

        try:
            assert run_task(engine, task, on_finished) == expected_rows(task, tiny_model_path)
            [name] = {name for call, name in (line.split() for line in dies.calls)}
            assert name.endswith(f"-round_01-{sha256(adapter)[:12]}")
            assert came_back[0].calls == [f"load {name}", f"unload {name}"] and came_back[0].adapters == {}
            assert came_back[0].answered.total() > 0
            answered = stays.answered + dies.answered + came_back[0].answered
            assert answered.total() <= 120 + 3
        finally:
            stop(came_back[0])
    lost, back = engine.notes
    assert lost.startswith(f"the server at http://127.0.0.1:{dies.server_port} is lost (")
    assert lost.endswith("); 1 of 2 are in use")
    assert back == f"the server at http://127.0.0.1:{dies.server_port} is back"


def test_what_comes_back_as_another_server_is_not_used(make_engine, tiny_model_path, tmp_path):
    task = write_task(tmp_path, 40)
    with serving(tiny_model_path, seconds=0.01) as stays:
        dies = start(ModelServer(tiny_model_path, seconds=0.01))
        engine = make_engine(stays, dies)
        other = []

        def on_finished(done: int) -> None:
            if done == 5:
                stop(dies)
                other.append(start(ModelServer("other", port=dies.server_port)))

        try:
            assert run_task(engine, task, on_finished) == expected_rows(task, tiny_model_path)
            assert other[0].completions == 0
        finally:
            stop(other[0])
    assert engine.notes[-1].startswith("left out: the server at http")
    assert f"has the model 'other', and the recipe asks for '{tiny_model_path}'" in engine.notes[-1]


def test_a_server_that_is_not_there_at_first_may_come(make_engine, tiny_model_path, tmp_path):
    with serving(tiny_model_path) as late:
        port = late.server_port
    task = write_task(tmp_path, 30)
    with serving(tiny_model_path, seconds=0.01) as there:
        engine = make_engine(there, f"http://127.0.0.1:{port}")
        came = []

        def on_finished(done: int) -> None:
            if done == 1:
                came.append(start(ModelServer(tiny_model_path, port=port, seconds=0.01)))

        try:
            assert run_task(engine, task, on_finished) == expected_rows(task, tiny_model_path)
            assert came[0].answered.total() > 0
        finally:
            stop(came[0])
    assert [note.split(" (")[0] for note in engine.notes] == [
        f"the server at http://127.0.0.1:{port} is lost",
        f"the server at http://127.0.0.1:{port} is back",
    ]


def test_requests_that_hang_are_sent_elsewhere(make_engine, tiny_model_path, tmp_path):
    task = write_task(tmp_path, 8)
    with serving(tiny_model_path, fail=lambda n: None) as hangs, serving(tiny_model_path) as sound:
        assert run_task(make_engine(hangs, sound, timeout=0.3), task) == expected_rows(task, tiny_model_path)
        assert hangs.answered.total() == 0


def test_without_any_server_the_run_stops_and_goes_on_later(make_engine, tiny_model_path, tmp_path):
    """What was answered is kept, and is not asked for again."""
    task = write_task(tmp_path, 20)
    first, second = (start(ModelServer(tiny_model_path, seconds=0.01)) for _ in range(2))
    engine = make_engine(first, second, max_outage=0.5)

    def on_finished(done: int) -> None:
        if done == 8:
            stop(first)
            stop(second)

    with pytest.raises(ChildError, match="could be used for 0.5 seconds .*Start them again") as error:
        run_task(engine, task, on_finished)
    assert all(server.url.removesuffix("/v1") in str(error.value) for server in (first, second))
    kept = read_jsonl(task.answers.with_name("answers.jsonl.part"))
    assert len(kept) >= 16
    with serving(tiny_model_path) as again:
        assert run_task(make_engine(again), task) == expected_rows(task, tiny_model_path)
        assert again.answered.total() == 40 - len(kept)


@pytest.mark.parametrize("retry_after", [None, "0.01"])
def test_a_server_that_is_busy_is_kept_and_left_alone(make_engine, adapter, tiny_model_path, tmp_path, retry_after):
    """Status 429 to half of the first requests costs none of them an attempt, and the server neither its adapter nor its place."""
    task = write_task(tmp_path, 10)
    with serving(
        tiny_model_path, fail=lambda n: 429 if n in range(2, 14, 2) else 200, retry_after=retry_after
    ) as server:
        engine = make_engine(server, adapter=adapter, max_retries=0)
        assert run_task(engine, task) == expected_rows(task, tiny_model_path)
        assert engine.notes == [] and [call.partition(" ")[0] for call in server.calls] == ["load", "unload"]


def test_a_server_that_is_busy_for_too_long_stops_the_run(make_engine, tiny_model_path, tmp_path):
    with serving(tiny_model_path, fail=lambda n: 429) as server:
        engine = make_engine(server, max_retries=0, max_outage=0.2)
        with pytest.raises(ChildError, match=r"a request of \d failed \d+ times \(the server at .*status 429"):
            run_task(engine, write_task(tmp_path, 3))


def test_one_request_s_error_is_not_the_server_s_death(make_engine, adapter, tiny_model_path, tmp_path):
    task = write_task(tmp_path, 10)
    with serving(tiny_model_path, fail=lambda n: 500 if n in (2, 7) else 200) as server:
        engine = make_engine(server, adapter=adapter)
        assert run_task(engine, task) == expected_rows(task, tiny_model_path)
        assert engine.notes == [] and [call.partition(" ")[0] for call in server.calls] == ["load", "unload"]


def test_a_request_that_no_server_can_answer_is_set_aside(make_engine, tiny_model_path, tmp_path):
    """The refinement of prompt 3: its draft is kept, its chain has a reason, and everything else is answered."""
    task = write_task(tmp_path, 10)
    expected = expected_rows(task, tiny_model_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    content = f"Sort : 3 {expected[3]['answers'][0]['text']}"
    poison = encode_prompt(tokenizer, [{"role": "user", "content": content}])
    with serving(tiny_model_path, poison=lambda token_ids: token_ids == poison) as server:
        engine = make_engine(server, max_retries=2)
        rows = run_task(engine, task)
    [note] = engine.notes
    assert note.startswith("set aside: a request of 3 failed 3 times (the server at ")
    unanswered = [{"turn": 2, "text": "", "tokens": 0, "finish_reason": "error"}]
    expected[3] |= {"answers": expected[3]["answers"][:1], "stopped": "request_failed", "unanswered": unanswered}
    assert rows == expected


def test_when_a_server_wants_to_be_asked_again():
    """RFC 9110: seconds, or a date."""
    now = datetime(2026, 11, 26, 12, 0, tzinfo=UTC)
    for text, seconds in (
        *(("7", 7.0), ("0.5", 0.5), ("-1", 0.0), ("86400", 600.0), ("nan", None), ("soon", None), ("", None)),
        ("Thu, 26 Nov 2026 12:00:30 GMT", 30.0),
        ("Thu, 26 Nov 2026 11:00:00 GMT", 0.0),
    ):
        assert retry_after({"retry-after": text}, now) == seconds
    assert retry_after({}) is None


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (503, r"a request of \d failed 3 times \(the server at .*status 503.*`generation.max_retries`"),
        (400, r"the server at .* does not take a request of \d: /v1/completions: status 400"),
    ],
)
def test_a_request_that_nobody_answers_stops_the_run(make_engine, tiny_model_path, tmp_path, status, message):
    with serving(tiny_model_path, fail=lambda n: status) as server:
        engine = make_engine(server, max_retries=2)
        with pytest.raises(ChildError, match=message):
            run_task(engine, write_task(tmp_path, 3))


def test_answers_for_the_parity_check(make_engine, tiny_model_path):
    """In the order of the prompts, without the one that is too long."""
    prompts = [{"prompt_id": str(i), "prompt": [{"role": "user", "content": f"Sort : {i}"}]} for i in range(5)]
    prompts.insert(2, {"prompt_id": "long", "prompt": [{"role": "user", "content": " ".join(["1"] * 60)}]})
    with serving(tiny_model_path, fail=lambda n: 500 if n == 2 else 200) as server:
        with closing(make_engine(server)) as engine:
            rows = engine.sample_logps(prompts, DraftsConfig(max_tokens=8), (0, "parity"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    kept = [row for row in prompts if row["prompt_id"] != "long"]
    assert rows == [
        {
            "prompt_id": row["prompt_id"],
            "prompt_token_ids": encode_prompt(tokenizer, row["prompt"]),
            "token_ids": [5, 6, 7],
            "logps": [logp(i, None) for i in (5, 6, 7)],
            "dtype": "float32",
        }
        for row in kept
    ]


# Adapters


def test_an_adapter_takes_the_place_of_the_run_s_earlier_ones(make_engine, adapter, tiny_model_path, tmp_path):
    """And not of another run's. Other weights at the same path are another name."""
    task = write_task(tmp_path, 2)
    with serving(tiny_model_path) as server:
        with closing(make_engine(server, adapter=adapter)):
            [first] = server.adapters
            path = server.adapters[first]
            server.adapters["trl-ext-of-another-run"] = "elsewhere"
        server.adapters[first] = path  # as a process that was killed leaves it
        assert path == str(adapter)
        (adapter / "adapter_model.safetensors").write_bytes(b"other weights")
        engine = make_engine(server, adapter=adapter)
        assert first not in server.adapters and len(server.adapters) == 2
        run_task(engine, task)
        assert server.adapters == {"trl-ext-of-another-run": "elsewhere"}


@pytest.mark.parametrize(
    ("probed", "message"),
    [
        ("far/away/adapter", r"and the tolerance is 0\.01\. Start it with"),
        (None, "and from those of the model as it came, without an adapter by 0"),
    ],
)
def test_a_server_that_answers_with_another_policy_is_refused(make_engine, adapter, tiny_model_path, probed, message):
    """One that says that it has loaded the adapter, and answers as another one would, or without it."""
    with serving(tiny_model_path) as server:
        if probed is None:  # an adapter of this length changes nothing
            server.complete = lambda body: ModelServer.complete(server, {**body, "model": server.model})
        with pytest.raises(WrongServer, match=message) as error:
            make_engine(server, adapter=adapter, probed=probed and Path(probed))
    assert f"does not answer with the adapter {adapter}" in str(error.value)


# Before any work


def check(*urls: str, model: str = "m", **options) -> list[str]:
    return check_servers(GenerationConfig(max_model_len=64, base_urls=list(urls), **options), Wanted(model, 64))


@pytest.mark.parametrize(
    ("server", "message"),
    [
        ({"model": "other"}, "has the model 'other', and the recipe asks for 'm'. Start it with that one"),
        ({"max_model_len": 32}, "takes sequences of 32 tokens.*`--max-model-len 64`"),
        ({"loras": False}, "cannot load adapters.*`--enable-lora`.*VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        ({"key": "another"}, "status 401.*`generation.api_key_env`"),
    ],
)
def test_another_server_than_the_recipe_asks_for_is_refused(server, message):
    with serving("m") as sound, serving(**{"model": "m"} | server) as wrong:
        assert check(sound.url, sound.url.removesuffix("/v1") + "/") == []
        with pytest.raises(RecipeError, match=f"`generation.base_urls`: the server at http.*{message}") as error:
            check(sound.url, wrong.url)
        assert wrong.url.removesuffix("/v1") in str(error.value)


def test_servers_that_cannot_be_reached():
    """One of two is a warning, since the run can do without; the only one is an error."""
    with serving("m") as gone:
        url = gone.url
    with serving("m") as sound:
        [note] = check(sound.url, url)
        assert note.startswith(f"the server at {url.removesuffix('/v1')} cannot be used: ConnectError")
    with pytest.raises(RecipeError, match=f"`generation.base_urls`: {note}.*Start it .*or put the right address"):
        check(url)


def test_the_key_comes_from_the_environment_and_is_not_shown(monkeypatch):
    with serving("m", key="another") as server:
        with pytest.raises(RecipeError, match="the environment variable VLLM_KEY is not set. Export the key"):
            check(server.url, api_key_env="VLLM_KEY")
        monkeypatch.setenv("VLLM_KEY", SECRET)
        with pytest.raises(RecipeError, match=r"Unauthorized: Bearer \*\*\*") as error:
            check(server.url, api_key_env="VLLM_KEY")
        assert SECRET not in str(error.value)
    with serving("m", key=SECRET) as server:
        assert check(server.url, api_key_env="VLLM_KEY") == []


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"base_urls": []}, "`generation.base_urls` is empty"),
        ({"base_urls": ["localhost:8000"]}, "`generation.base_urls` must start with http"),
        ({"base_urls": ["http://user:abc@localhost"]}, "`generation.base_urls` holds a user, a password"),
        ({"base_urls": ["http://a", "http://a"]}, "`generation.base_urls` has http://a twice"),
        ({"base_urls": ["http://a"], "api_key_env": "abc-def"}, "`generation.api_key_env` is not the name"),
        ({"base_urls": ["http://a"], "timeout": 0}, "`generation.timeout` must be positive"),
        ({"base_urls": ["http://a"]}, "full fine-tuning makes new ones in every round.*`model.use_peft: true`"),
    ],
)
def test_what_a_recipe_may_not_say(sections, message):
    with pytest.raises(RecipeError, match=message) as error:
        parse_section(Recipe(None, {**MINIMAL, "generation": sections}, {}), AriesConfig)
    assert "abc" not in str(error.value)


# Real servers


class VllmServer:
    """`vllm serve` on the CPU, in a session of its own, so that a SIGKILL takes its engine too."""

    def __init__(self, model: str, log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.model, self.log = model, log
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        options = ["--dtype", "float32", "--max-model-len", "64", "--max-num-seqs", "8", "--enforce-eager"]
        options += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "512", "--load-format", "safetensors"]
        options += ["--enable-lora", "--max-lora-rank", "8", "--generation-config", "vllm"]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model, *options]
        env = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_API_KEY": SECRET}
        env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)

    def wait(self) -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            with suppress(httpx.HTTPError):
                if httpx.get(self.url.removesuffix("/v1") + "/health").status_code == 200:
                    return
            time.sleep(0.2)
        raise AssertionError(self.log.read_text())

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        self.process.wait()


@contextmanager
def vllm_servers(model: str, directory: Path, count: int):
    servers = [VllmServer(model, directory / f"server{i}.log") for i in range(count)]
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait()
        yield servers
    finally:
        for server in servers:
            server.kill()


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("VLLM_KEY", SECRET)


@pytest.mark.vllm
def test_a_server_answers_as_the_embedded_engine_does(key, tiny_model_path, tmp_path):
    """
    Oracle: the embedded engine, on the same job: greedy and sampled chains with an adapter, and the answers for the parity check. Another
    server of the list is not there. The trainer's log-probabilities under another adapter are then no match.
    """
    adapters = {}
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    policy = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    for name in ("round_01", "round_02"):
        for parameter_name, parameter in policy.named_parameters():
            if "lora_B" in parameter_name:
                parameter.data += 0.3 * torch.randn(parameter.shape)
        adapters[name] = str(tmp_path / name / "adapter")
        policy.save_pretrained(adapters[name])

    prompts = [{"prompt_id": str(i), "prompt": [{"role": "user", "content": f"Sort : {i} 3 1 2"}]} for i in range(9)]
    prompts.append({"prompt_id": "long", "prompt": [{"role": "user", "content": " ".join(["1"] * 60)}]})
    (tmp_path / "prompts.jsonl").write_text("".join(map(to_line, prompts)))

    sampling = {
        "top_k": 12,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
        "max_tokens": 8,
        "stop": "9",
        "stop_token_ids": [11],
    }

    def generate(name: str, **generation) -> dict[str, list[dict]]:
        directory = tmp_path / name
        directory.mkdir()
        files = {task: directory / f"{task}.jsonl" for task in ("greedy", "sampled", "parity")}
        config = GenerationConfig(
            max_model_len=64, max_num_seqs=8, dtype="float32", cpu_kv_cache_gib=1, max_outage=60.0, **generation
        )
        tasks = [
            {
                "prompts": str(tmp_path / "prompts.jsonl"),
                "answers": str(files[task]),
                "refinements": asdict(RefinementsConfig(turns=3, template=TEMPLATE)),
                "sampling": [asdict(DraftsConfig(temperature=temperature, **sampling))] * 3,
                "seed": [0, 1],
            }
            for task, temperature in (("greedy", 0.0), ("sampled", 1.0))
        ]
        job = {
            "model": tiny_model_path,
            "adapter": ["round_02", 3, adapters["round_02"]],
            "max_lora_rank": 8,
            "revision": None,
            "trust_remote_code": False,
            "generation": asdict(config),
            "tasks": tasks,
            "parity": {
                "prompts": str(tmp_path / "prompts.jsonl"),
                "answers": str(files["parity"]),
                "samples": 10,
                "sampling": asdict(DraftsConfig(**sampling)),
                "seed": [0, "parity"],
            },
            "probe": str(tmp_path / "parity_probe.json"),
        }
        run_child("trl_ext.aries.engine", job, directory / "engine.log", lambda *report: None, on_note=notes.append)
        return {task: read_jsonl(file) for task, file in files.items()}

    policies = {"policy": adapters["round_02"], "base": None, "previous": adapters["round_01"]}
    probe_job = {
        "policies": {name: {"model": tiny_model_path, "adapter": path} for name, path in policies.items()},
        "tolerance": None,
        "quantization": None,
        "loading": {"revision": None, "trust_remote_code": False, "use_cpu": True},
        "prompts": str(tmp_path / "prompts.jsonl"),
        "output": str(tmp_path / "parity_probe.json"),
        "dtype": "float32",
        "max_model_len": 64,
    }
    notes: list[str] = []
    with vllm_servers(tiny_model_path, tmp_path, 1) as [server], serving(tiny_model_path) as gone:
        stop(gone)
        run_child("trl_ext.aries.probe", probe_job, tmp_path / "probe.log", lambda *report: None)
        embedded = generate("embedded")
        assert notes == []
        served = generate("served", base_urls=[server.url, gone.url], api_key_env="VLLM_KEY")
        assert len(notes) == 1 and notes[0].endswith("; 1 of 2 are in use")
        assert served["greedy"] == embedded["greedy"] and served["sampled"] == embedded["sampled"]
        assert served["greedy"] != served["sampled"] and served["greedy"][-1]["stopped"] == "prompt_too_long"
        for found, expected in zip(served["parity"], embedded["parity"], strict=True):
            assert found.pop("logps") == pytest.approx(expected.pop("logps"), abs=1e-4)
            assert found == expected

        url = server.url.removesuffix("/v1")
        models = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {SECRET}"}).json()["data"]
        assert [model["id"] for model in models] == [tiny_model_path], "the adapter was unloaded"
        config = GenerationConfig(base_urls=[server.url], api_key_env="VLLM_KEY", max_model_len=64)
        file = tmp_path / "parity_probe.json"
        probe = json.loads(file.read_text())
        probe["logps"] |= {"policy": probe["logps"]["previous"], "previous": probe["logps"]["policy"]}
        file.write_text(json.dumps(probe))
        named = ("round_02", 3, adapters["round_02"])
        with pytest.raises(
            WrongServer, match=f"{url} does not answer with .* those of the policy of the round before"
        ):
            ServedEngine(EngineSettings(tiny_model_path, config, named, max_lora_rank=8), file, notes.append)
        for wanted, message in (
            (Wanted("other", 64), f"has the model '{tiny_model_path}', and the recipe asks for 'other'"),
            (Wanted(tiny_model_path, 128), "`--max-model-len 128`"),
        ):
            with pytest.raises(RecipeError, match=message):
                check_servers(config, wanted)
        assert check_servers(config, Wanted(tiny_model_path, 64)) == []
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path != server.log]
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


@pytest.mark.slow
@pytest.mark.vllm
def test_a_run_on_two_servers_of_which_one_is_killed_and_one_hangs(key, sorting, whole_run, tmp_path):
    """
    Oracle: the run of the embedded engine that nothing disturbed, byte for byte but for log-probabilities of other batches. In the middle of
    round 1 a server gets SIGKILL; the other one goes on alone; then that one is frozen, as if its machine were gone, and the first is started
    again, without the adapter that it had, and ends the round. In round 2 both are used.
    """
    output = tmp_path / "run"
    with vllm_servers(str(sorting / "model"), tmp_path, 2) as [killed, frozen]:
        changes = recipe(sorting, output)["generation"]
        changes |= {"base_urls": [killed.url, frozen.url], "api_key_env": "VLLM_KEY", "max_concurrency_per_server": 1}
        file = output.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(recipe(sorting, output, generation=changes)))
        part = output / "round_01" / "answers.jsonl.part"

        def wait_for(condition) -> None:
            deadline = time.monotonic() + 400
            while not condition():
                assert process.poll() is None, process.stdout.read()
                assert time.monotonic() < deadline
                time.sleep(0.001)

        def answers() -> int:
            return part.read_bytes().count(b"\n") if part.exists() else 0

        with subprocess.Popen(command(file), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            wait_for(lambda: answers() >= 6)
            killed.kill()
            at_kill = answers()
            wait_for(lambda: answers() >= at_kill + 6)
            frozen.signal(signal.SIGSTOP)
            killed.start()
            killed.wait()
            wait_for(lambda: (output / "round_01" / "answers.jsonl").exists())
            frozen.signal(signal.SIGCONT)
            printed = process.stdout.read()
        assert process.returncode == 0, printed

    events = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
    notes = [event["note"] for event in events if event["event"] == "note" and event["round"] == 1]
    a, b = (f"the server at {server.url.removesuffix('/v1')}" for server in (killed, frozen))
    assert notes[0].startswith(f"{a} is lost (") and notes[0].endswith("1 of 2 are in use")
    assert any(note.startswith(f"{b} is lost (") for note in notes) and f"{a} is back" in notes
    assert all(note in printed for note in notes)

    by_rounding = ("parity.jsonl", "parity_probe.json", "parity.json", "metrics.json", "manifest.json", "health.json")
    found, expected = (
        {name: content for name, content in results(path).items() if not name.endswith(by_rounding)}
        for path in (output, whole_run[0])
    )
    assert found == expected
    for number in (0, 1, 2):
        samples, others = (read_jsonl(path / f"round_0{number}" / "parity.jsonl") for path in (output, whole_run[0]))
        assert [row["token_ids"] for row in samples] == [row["token_ids"] for row in others]
    files = [path for path in output.rglob("*") if path.is_file()]
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
