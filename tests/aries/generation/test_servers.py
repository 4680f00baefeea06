"""
Generation on servers. What servers do rarely, failing, hanging, coming back as another one, is done by small HTTP servers, whose answers are
known. They wait for events, such as a note of the engine, never for a time. The last tests are of real vLLM servers.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

import httpx
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from tests.aries import engine_process
from tests.aries.engine_process import Asked, run_engine
from tests.aries.model_server import ModelServer, answer, logp, serving, stop
from tests.aries.tiny_run import MINIMAL, command, recipe, results
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_ext.aries.checks.probe import write_probe
from trl_ext.aries.children import ChildError
from trl_ext.aries.config import (
    AriesConfig,
    DraftsConfig,
    GenerationConfig,
    JudgeConfig,
    RefinementsConfig,
    ScorerConfig,
)
from trl_ext.aries.data.records import read_jsonl, sha256, to_line
from trl_ext.aries.generation import served_engine, servers
from trl_ext.aries.generation.chains import EngineSettings, Task, answer_task
from trl_ext.aries.generation.clients import retry_after
from trl_ext.aries.generation.drafts import encode_prompt, request_seed
from trl_ext.aries.generation.generate import ParitySamples
from trl_ext.aries.generation.refinements import Strategy
from trl_ext.aries.generation.served_engine import ServedEngine
from trl_ext.aries.generation.servers import Wanted, WrongServer, check_servers
from trl_ext.aries.policies import Comparison, Policy
from trl_ext.aries.scoring.judge import Judge
from trl_ext.recipe import Recipe, RecipeError, parse_section


SECRET = "sk-" + "S3cret" * 5
TEXTS = [{"token_ids": [1, 2, 3, 4, 5], "positions": [1, 2, 4]}, {"token_ids": [6, 5, 4], "positions": [2]}]


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Waits of hundredths of a second."""
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
    """An engine on servers, whose probe is what `ModelServer` computes with the adapter at `probed`. It keeps its notes."""

    def make(*servers, adapter=None, probed=None, on_note=lambda text: None, **options):
        def logps(path: Path | None) -> list[float]:
            tokens = [text["token_ids"][position] for text in TEXTS for position in text["positions"]]
            return [logp(i, None if path is None else str(path)) for i in tokens]

        probe = {"dtype": "float32", "tolerance": 0.01, "texts": TEXTS}
        probe["logps"] = {"policy": logps(probed or adapter), **({} if adapter is None else {"base": logps(None)})}
        (tmp_path / "parity_probe.json").write_text(json.dumps(probe))
        urls = [server if isinstance(server, str) else server.url for server in servers]
        options = {"max_model_len": 64, "max_concurrency_per_server": 3} | options
        named = None if adapter is None else ("round_01", 2, str(adapter))
        settings = EngineSettings(tiny_model_path, GenerationConfig(base_urls=urls, **options), named, max_lora_rank=8)
        notes: list[str] = []

        def note(text: str) -> None:
            notes.append(text)
            on_note(text)

        engine = ServedEngine(settings, tmp_path / "parity_probe.json", note)
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


def at(server) -> str:
    return f"the server at {server.url.removesuffix('/v1')}"


def test_chains_are_spread_and_failed_requests_are_sent_again(make_engine, adapter, tiny_model_path, tmp_path):
    """
    Every fifth request fails on one server. Each is answered once, both servers have had three at a time, and never more. A server that is
    well when it is looked at was never lost, and has kept its adapter.
    """
    task = write_task(tmp_path, 30)
    with (
        serving(tiny_model_path, together=3) as sound,
        serving(tiny_model_path, together=3, fail=lambda n: 500 if n % 5 == 0 else 200) as failing,
    ):
        engine = make_engine(sound, failing, adapter=adapter)
        assert run_task(engine, task) == expected_rows(task, tiny_model_path)
        answered = sound.answered + failing.answered
        assert answered.total() == 60 and set(answered.values()) == {1}
        for server in (sound, failing):
            assert server.most_active == 3 and [call.split()[0] for call in server.calls] == ["load", "unload"]
    assert engine.notes == []


def test_refinements_are_asked_for_where_the_draft_was(make_engine, tiny_model_path, tmp_path):
    """So that the prompt is in the prefix cache. There is room for exactly as many chains: nobody has to move."""
    task = write_task(tmp_path, 6)
    with serving(tiny_model_path, together=3) as a, serving(tiny_model_path, together=3) as b:
        assert run_task(make_engine(a, b), task) == expected_rows(task, tiny_model_path)
        for server in (a, b):
            assert server.answered.total() == 6
            assert len({ids[:5] for ids, _ in server.answered}) == 3, "three drafts and their three refinements"


def test_a_server_dies_and_comes_back(make_engine, adapter, tiny_model_path, tmp_path):
    """
    Its chains go on elsewhere. What comes back at its address has lost the adapter, and is used once it has it again; until then the other
    server holds its answers back. Nothing is generated twice but what the dead server had in flight, three at most.
    """
    task = write_task(tmp_path, 30)
    with serving(tiny_model_path) as stays, serving(tiny_model_path) as dies, ExitStack() as later:
        came_back = []

        def on_finished(done: int) -> None:
            if done == 10:
                stays.gate.clear()
                stop(dies)

        def on_note(text: str) -> None:
            if " is lost (" in text:
                came_back.append(later.enter_context(serving(tiny_model_path, port=dies.server_port)))
                came_back[0].has_answered = stays.gate

        engine = make_engine(stays, dies, adapter=adapter, on_note=on_note)
        assert run_task(engine, task, on_finished) == expected_rows(task, tiny_model_path)
        [server] = came_back
        [call] = dies.calls
        name = call.removeprefix("load ")
        assert name.endswith(f"-round_01-{sha256(adapter)[:12]}")
        assert server.calls == [f"load {name}", f"unload {name}"] and server.adapters == {}
        assert (stays.answered + dies.answered + server.answered).total() <= 60 + 3
    lost, back = engine.notes
    assert lost.startswith(f"{at(dies)} is lost (") and lost.endswith("); 1 of 2 are in use")
    assert back == f"{at(dies)} is back"


def test_what_comes_back_as_another_server_is_not_used(make_engine, tiny_model_path, tmp_path):
    task = write_task(tmp_path, 20)
    with serving(tiny_model_path) as stays, serving(tiny_model_path) as dies, ExitStack() as later:
        other = []

        def on_finished(done: int) -> None:
            if done == 5:
                stays.gate.clear()
                stop(dies)

        def on_note(text: str) -> None:
            if " is lost (" in text:
                other.append(later.enter_context(serving("other", port=dies.server_port)))
            elif text.startswith(f"left out: {at(dies)} has the model 'other'"):
                stays.gate.set()

        engine = make_engine(stays, dies, on_note=on_note)
        assert run_task(engine, task, on_finished) == expected_rows(task, tiny_model_path)
        assert len(engine.notes) == 2 and other[0].completions == 0


def test_a_server_that_is_not_there_at_first_may_come(make_engine, tiny_model_path, tmp_path):
    task = write_task(tmp_path, 10)
    with serving(tiny_model_path) as there, serving(tiny_model_path) as late, ExitStack() as later:
        stop(late)
        there.gate.clear()

        def on_note(text: str) -> None:
            if " is lost (" in text:
                later.enter_context(serving(tiny_model_path, port=late.server_port)).has_answered = there.gate

        engine = make_engine(there, late.url, on_note=on_note)
        assert run_task(engine, task) == expected_rows(task, tiny_model_path)
    assert [note.split(" (")[0] for note in engine.notes] == [f"{at(late)} is lost", f"{at(late)} is back"]


def test_requests_that_hang_are_sent_again(make_engine, tiny_model_path, tmp_path):
    """The other server answers once three of them hang, as many as a server gets at a time."""
    task = write_task(tmp_path, 8)
    with serving(tiny_model_path) as sound:
        sound.gate.clear()

        def hang(n: int) -> int | None:
            if n == 3:
                sound.gate.set()
            return None if n <= 3 else 200

        with serving(tiny_model_path, fail=hang) as hangs:
            assert run_task(make_engine(hangs, sound, timeout=1.0), task) == expected_rows(task, tiny_model_path)
            assert hangs.completions >= 3


def test_a_server_that_freezes_loses_its_requests(make_engine, tiny_model_path, tmp_path, monkeypatch):
    """It closes no connection, so what tells is its health check, long before a request's own time-out."""
    monkeypatch.setattr(servers, "LONGEST_HEALTH", 1.0)
    task = write_task(tmp_path, 20)
    with serving(tiny_model_path) as stays, serving(tiny_model_path) as freezes:

        def on_finished(done: int) -> None:
            freezes.frozen = freezes.frozen or done >= 5

        engine = make_engine(stays, freezes)
        assert run_task(engine, task, on_finished) == expected_rows(task, tiny_model_path)
    assert any(note.startswith(f"{at(freezes)} is lost (") for note in engine.notes)


def test_without_any_server_the_run_stops_and_goes_on_later(make_engine, tiny_model_path, tmp_path):
    """What was answered is kept, and is not asked for again."""
    task = write_task(tmp_path, 20)
    with serving(tiny_model_path) as first, serving(tiny_model_path) as second, serving(tiny_model_path) as again:

        def on_finished(done: int) -> None:
            if done == 8:
                stop(first)
                stop(second)

        with pytest.raises(ChildError, match="`generation.max_outage`") as error:
            run_task(make_engine(first, second, max_outage=0.5), task, on_finished)
        assert at(first) in str(error.value) and at(second) in str(error.value)
        kept = read_jsonl(task.answers.with_name("answers.jsonl.part"))
        assert len(kept) >= 16
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
        assert engine.notes == [] and [call.split()[0] for call in server.calls] == ["load", "unload"]


@pytest.mark.parametrize(
    ("status", "options", "message"),
    [
        (429, {"max_retries": 0, "max_outage": 0.2}, "status 429.*`generation.max_retries`"),
        (503, {"max_retries": 2}, "status 503.*`generation.max_retries`"),
        (400, {"max_retries": 2}, "status 400"),
    ],
)
def test_a_request_that_nobody_answers_stops_the_run(make_engine, tiny_model_path, tmp_path, status, options, message):
    with serving(tiny_model_path, fail=lambda n: status) as server:
        with pytest.raises(ChildError, match=f"{at(server)}.*{message}"):
            run_task(make_engine(server, **options), write_task(tmp_path, 3))


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
    assert note.startswith("set aside: a request of 3 failed 3 times")
    unanswered = [{"turn": 2, "text": "", "tokens": 0, "finish_reason": "error"}]
    expected[3] |= {"answers": expected[3]["answers"][:1], "stopped": "request_failed", "unanswered": unanswered}
    assert rows == expected


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("7", 7.0), ("0.5", 0.5), ("-1", 0.0), ("86400", 600.0), ("nan", None), ("soon", None), ("", None)),
        ("Thu, 26 Nov 2026 12:00:30 GMT", 30.0),
        ("Thu, 26 Nov 2026 11:00:00 GMT", 0.0),
    ],
)
def test_when_a_server_wants_to_be_asked_again(text, seconds):
    """RFC 9110: seconds, or a date."""
    assert retry_after({"retry-after": text}, datetime(2026, 11, 26, 12, 0, tzinfo=UTC)) == seconds


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
    """And not of another run's. Other weights at the same path get another name."""
    with serving(tiny_model_path) as server:
        with closing(make_engine(server, adapter=adapter)):
            [first] = server.adapters
        server.adapters = {"trl-ext-of-another-run": "elsewhere", first: str(adapter)}  # as a killed process leaves it
        (adapter / "adapter_model.safetensors").write_bytes(b"other weights")
        with closing(make_engine(server, adapter=adapter)):
            assert first not in server.adapters and str(adapter) in server.adapters.values()
        assert server.adapters == {"trl-ext-of-another-run": "elsewhere"}


@pytest.mark.parametrize(
    ("probed", "message"), [("far/away/adapter", "tolerance is"), (None, "from those of the model without an adapter")]
)
def test_a_server_that_answers_with_another_policy_is_refused(make_engine, adapter, tiny_model_path, probed, message):
    """One that says that it has loaded the adapter, and answers as another one would, or without it."""
    with serving(tiny_model_path) as server:
        if probed is None:
            server.complete = lambda body: ModelServer.complete(server, {**body, "model": server.model})
        with pytest.raises(WrongServer, match=f"does not answer with the adapter {adapter}.*{message}"):
            make_engine(server, adapter=adapter, probed=probed and Path(probed))


# Before any work


def check(*urls: str, model: str = "m", **options) -> list[str]:
    return check_servers(GenerationConfig(max_model_len=64, base_urls=list(urls), **options), Wanted(model, 64))


@pytest.mark.parametrize(
    ("server", "message"),
    [
        ({"model": "other"}, "has the model 'other', and the recipe asks for 'm'"),
        ({"max_model_len": 32}, "`--max-model-len 64`"),
        ({"loras": False}, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        ({"key": "another"}, "status 401.*`generation.api_key_env`"),
    ],
)
def test_another_server_than_the_recipe_asks_for_is_refused(server, message):
    with serving("m") as sound, serving(**{"model": "m"} | server) as wrong:
        assert check(sound.url, sound.url.removesuffix("/v1") + "/") == []
        with pytest.raises(RecipeError, match=f"`generation.base_urls`: {at(wrong)}.*{message}"):
            check(sound.url, wrong.url)


def test_servers_that_cannot_be_reached():
    """One of two is a warning, since the run can do without; the only one is an error."""
    with serving("m") as sound, serving("m") as gone:
        stop(gone)
        [note] = check(sound.url, gone.url)
        assert note.startswith(f"{at(gone)} cannot be used: ConnectError")
        with pytest.raises(RecipeError, match=f"`generation.base_urls`: {note}"):
            check(gone.url)
    with pytest.raises(RecipeError, match="`generation.base_urls`: 'http://127.0.0.1:port/v1' is not a URL"):
        check("http://127.0.0.1:port")


def test_the_key_comes_from_the_environment_and_is_not_shown(monkeypatch):
    with serving("m", key="another") as server:
        with pytest.raises(
            RecipeError, match="`generation.api_key_env`: the environment variable VLLM_KEY is not set"
        ):
            check(server.url, api_key_env="VLLM_KEY")
        monkeypatch.setenv("VLLM_KEY", SECRET)
        with pytest.raises(RecipeError, match=r"Unauthorized: Bearer \*\*\*") as error:
            check(server.url, api_key_env="VLLM_KEY")
        assert SECRET not in str(error.value)
    with serving("m", key=SECRET) as server:
        assert check(server.url, api_key_env="VLLM_KEY") == []


def test_nothing_else_is_sent_and_nowhere_else(monkeypatch):
    """Not what the client would take from the environment, and not to where a server points."""
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, SECRET)
    with serving("m") as server, serving("m", location=server.url) as points:
        with pytest.raises(RecipeError, match="status 307"):
            check(points.url)
        assert server.headers is None
        check(server.url)
        assert SECRET not in str(server.headers)


def test_the_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    modules = [f"trl_ext.aries.{name}" for name in ("generation.clients", "generation.servers", "scoring.judge")]
    for module in modules:
        monkeypatch.delitem(sys.modules, module)
    for module in modules:
        with pytest.raises(RecipeError, match="`generation.base_urls` and `judge`.*pip install 'openai"):
            import_module(module)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"base_urls": []}, "`generation.base_urls`"),
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
        # Held, so that nobody else is given it. vLLM asks for it with the same option, and may then listen
        self.held = socket.socket()
        self.held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.held.bind(("127.0.0.1", 0))
        self.port = self.held.getsockname()[1]
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
        deadline = time.monotonic() + 900
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
            server.held.close()


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("VLLM_KEY", SECRET)


@pytest.mark.vllm
def test_a_server_answers_as_the_embedded_engine_does(tiny_model_path, tmp_path, monkeypatch):
    """
    Oracle: the embedded engine, on the same job: greedy and sampled chains with an adapter, and the answers for the parity check. Another
    server of the list is not there. The trainer's log-probabilities under another adapter then do not match. A judge asks the same server.
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
        file, refinements = tmp_path / "prompts.jsonl", RefinementsConfig(turns=3, template=TEMPLATE)
        tasks = [
            Asked(file, files[task], refinements, [DraftsConfig(temperature=temperature, **sampling)] * 3)
            for task, temperature in (("greedy", 0.0), ("sampled", 1.0))
        ]
        settings = EngineSettings(tiny_model_path, config, ("round_02", 3, adapters["round_02"]), max_lora_rank=8)
        parity = ParitySamples(file, files["parity"], 10, DraftsConfig(**sampling), seed=(0, "parity"))
        ask = run_engine if config.base_urls is None else engine_process.answer
        notes.extend(ask(settings, tasks, parity, tmp_path / "parity_probe.json"))
        return {task: read_jsonl(file) for task, file in files.items()}

    policies = {"policy": adapters["round_02"], "base": None, "previous": adapters["round_01"]}
    comparison = Comparison(2, {name: Policy(tiny_model_path, path) for name, path in policies.items()}, use_cpu=True)
    notes: list[str] = []
    with vllm_servers(tiny_model_path, tmp_path, 1) as [server], serving(tiny_model_path) as gone:
        stop(gone)
        write_probe(comparison, tmp_path / "prompts.jsonl", tmp_path / "parity_probe.json", "float32", 64)
        embedded = generate("embedded")
        assert notes == []
        monkeypatch.setenv("VLLM_KEY", SECRET)
        served = generate("served", base_urls=[server.url, gone.url], api_key_env="VLLM_KEY")
        assert len(notes) == 1 and notes[0].endswith("; 1 of 2 are in use")
        assert served["greedy"] == embedded["greedy"] and served["sampled"] == embedded["sampled"]
        assert served["greedy"] != served["sampled"] and served["greedy"][-1]["stopped"] == "prompt_too_long"
        for found, expected in zip(served["parity"], embedded["parity"], strict=True):
            assert found.pop("logps") == pytest.approx(expected.pop("logps"), abs=1e-4)
            assert found == expected

        url = server.url.removesuffix("/v1")
        headers = {"Authorization": f"Bearer {SECRET}"}
        models = httpx.get(f"{url}/v1/models", headers=headers, timeout=300).json()["data"]
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

        template = "{{ question }} {{ answer_a }} {{ answer_b }}"
        judge = JudgeConfig(server.url, tiny_model_path, api_key_env="VLLM_KEY", template=template, max_tokens=4)
        Judge(ScorerConfig(judge=judge)).check([prompts])
        with pytest.raises(RecipeError, match="the judge other .*status 404"):
            Judge(ScorerConfig(judge=replace(judge, model="other"))).check([prompts])
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
