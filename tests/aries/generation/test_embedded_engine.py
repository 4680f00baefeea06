"""
The chain driver on a small engine of our own, and the embedded engine itself on the tiny model, against transformers.
"""

import json
import random
import re
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

import pytest
from tests.aries.engine_process import Asked, run_engine

from trl_ext.aries.config import DraftsConfig, GenerationConfig, RefinementsConfig
from trl_ext.aries.data.records import Answer, Chain, read_jsonl, to_line
from trl_ext.aries.generation.chains import EngineSettings, run_chains
from trl_ext.aries.generation.drafts import request_seed, stop_token_ids
from trl_ext.aries.generation.generate import ParitySamples


class ScriptedEngine:
    """Answers up to `slots` requests per step, each after as many steps as its (seeded) length says."""

    def __init__(self, turns: int, seed: int = 0):
        self.turns = turns
        self.random = random.Random(seed)
        self.running: dict[str, tuple[Chain, int]] = {}
        self.most_running = 0
        self.order: list[tuple[str, int]] = []

    def submit(self, chain: Chain) -> bool:
        if len(chain.answers) == self.turns or (chain.prompt == "too long"):
            return False
        assert chain.prompt_id not in self.running, "a chain has one request at a time"
        self.running[chain.prompt_id] = (chain, self.random.choice([1, 1, 2, 9]))
        self.most_running = max(self.most_running, len(self.running))
        self.order.append((chain.prompt_id, len(chain.answers) + 1))
        return True

    def step(self) -> list[Chain]:
        done = []
        for prompt_id, (chain, left) in list(self.running.items()):
            self.running[prompt_id] = (chain, left - 1)
            if left == 1:
                del self.running[prompt_id]
                chain.answers.append(Answer(len(chain.answers) + 1, "text", 1, "stop"))
                done.append(chain)
        return done


@pytest.mark.parametrize("window", [1, 3, 50])
def test_every_chain_gets_every_turn_once_and_the_window_holds(window):
    engine = ScriptedEngine(turns=4)
    answers, finished = [], []
    chains = (Chain(str(i), "x") for i in range(20))
    run_chains(
        engine,
        chains,
        window,
        lambda advanced: answers.extend((chain.prompt_id, len(chain.answers)) for chain in advanced),
        finished.append,
    )
    assert sorted(answers) == sorted((str(i), turn) for i in range(20) for turn in (1, 2, 3, 4))
    assert sorted(int(chain.prompt_id) for chain in finished) == list(range(20))
    assert all([a.turn for a in chain.answers] == [1, 2, 3, 4] for chain in finished)
    assert engine.most_running == min(window, 20)


def test_there_is_no_barrier_between_turns():
    """Some chain asks for its last refinement before another has its draft."""
    engine = ScriptedEngine(turns=3)
    run_chains(engine, [Chain(str(i), "x") for i in range(8)], 4, lambda chains: None, lambda chain: None)
    first_last_turn = next(i for i, (_, turn) in enumerate(engine.order) if turn == 3)
    last_draft = max(i for i, (_, turn) in enumerate(engine.order) if turn == 1)
    assert first_last_turn < last_draft


def test_chains_that_cannot_start_are_finished_and_block_nothing():
    engine = ScriptedEngine(turns=2)
    chains = [Chain("a", "too long"), Chain("b", "x"), Chain("c", "too long"), Chain("d", "too long")]
    finished = []
    run_chains(engine, chains, 1, lambda chains: None, finished.append)
    assert {chain.prompt_id: len(chain.answers) for chain in finished} == {"a": 0, "b": 2, "c": 0, "d": 0}


def test_seeds_belong_to_the_request():
    assert request_seed(0, 1, "p", 1) == request_seed(0, 1, "p", 1)
    assert len({request_seed(seed, r, p, t) for seed in (0, 1) for r in (1, 2) for p in "ab" for t in (1, 2)}) == 16
    assert 0 <= request_seed(0) < 2**31


def test_answers_end_at_every_eos_there_is(tiny_model_path):
    from transformers import AutoTokenizer
    from transformers import GenerationConfig as HFGenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    assert stop_token_ids(tokenizer, None) == [tokenizer.eos_token_id]
    assert set(stop_token_ids(tokenizer, HFGenerationConfig(eos_token_id=[7, 9]))) == {tokenizer.eos_token_id, 7, 9}
    assert stop_token_ids(tokenizer, HFGenerationConfig(eos_token_id=None)) == [tokenizer.eos_token_id]


def settings(model: str, adapter: Path | None = None, **generation) -> EngineSettings:
    config = GenerationConfig(
        **{"max_model_len": 64, "max_num_seqs": 8, "dtype": "float32", "cpu_kv_cache_gib": 1, **generation}
    )
    return EngineSettings(model, config, None if adapter is None else ("round_01", 1, str(adapter)), max_lora_rank=8)


def asked(directory: Path, prompts: list[dict], temperature=0.0) -> Asked:
    """These prompts, in a file, with a draft and a refinement each."""
    file = directory / "prompts.jsonl"
    file.write_text("".join(map(to_line, prompts)))
    return Asked(
        file,
        directory / "answers.jsonl",
        RefinementsConfig(turns=2, template="{{ question }} {{ draft }}"),
        [DraftsConfig(temperature=temperature, max_tokens=8)] * 2,
    )


def greedy(model, tokenizer, prompt, max_new_tokens: int = 8, **options) -> str:
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**ids, max_new_tokens=max_new_tokens, do_sample=False, **options)
    return tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def with_strategies(task: Asked, strategies: dict, sampling: list[DraftsConfig], **changes) -> dict[str, Asked]:
    """The task with several strategies."""
    return {
        name: replace(
            task,
            answers=task.answers.with_name(f"{name}.jsonl"),
            refinements=RefinementsConfig(strategy=name, turns=len(sampling), **templates),
            sampling=sampling,
            **changes,
        )
        for name, templates in strategies.items()
    }


# With an adapter: one start of the engine answers everything


@pytest.fixture(scope="module")
def policy(tiny_model_path, tmp_path_factory):
    """The model with an adapter that changes what it says, which is saved as its `adapter`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    policy = get_peft_model(base, config)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:  # zero at the start: an adapter that is not applied would go unnoticed
            torch.nn.init.normal_(parameter, std=0.5)
    policy.adapter = tmp_path_factory.mktemp("policy") / "adapter"
    policy.save_pretrained(policy.adapter)
    return policy


@pytest.fixture(scope="module")
def tokenizer(tiny_model_path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_path)


NINE = [{"prompt_id": str(i), "prompt": user(f"Sort : {i} {i + 1}")} for i in range(9)]
SIX = NINE[:6]


@dataclass
class Adapted:
    """What the engine answers with the adapter, and what it was asked."""

    drafts: list[str]  # the oracle's, of the six prompts
    word: str  # one of theirs
    directory: Path

    def rows(self, name: str) -> list[dict]:
        return read_jsonl(self.directory / f"{name}.jsonl")


@pytest.fixture(scope="module")
def adapted(tiny_model_path, policy, tokenizer, tmp_path_factory) -> Adapted:
    directory = tmp_path_factory.mktemp("adapted")
    drafts = [greedy(policy, tokenizer, row["prompt"]) for row in SIX]
    word = drafts[0].split()[-1]
    cases = {
        "stop": {"temperature": 0.0, "stop": word},
        "stop_token_ids": {
            "temperature": 0.0,
            "stop_token_ids": tokenizer(word, add_special_tokens=False)["input_ids"][-1:],
        },
        "repetition_penalty": {"temperature": 0.0, "repetition_penalty": 1.5},
        "min_p": {"temperature": 1.0, "min_p": 1.0},
    }
    task = asked(directory, [*SIX, {"prompt_id": "long", "prompt": user(" ".join(["1"] * 60))}])
    six = directory / "six.jsonl"
    six.write_text("".join(map(to_line, SIX)))
    twice = RefinementsConfig(strategy="parallel", turns=2)
    tasks = [
        Asked(six, directory / f"{name}.jsonl", twice, [DraftsConfig(max_tokens=8, **case)] * 2)
        for name, case in cases.items()
    ]
    sampling = DraftsConfig(max_tokens=8, stop=[word])
    parity = ParitySamples(six, directory / "parity.jsonl", 6, sampling, seed=(0,))
    run_engine(settings(tiny_model_path, policy.adapter), [task, *tasks], parity)
    return Adapted(drafts, word, directory)


@pytest.mark.vllm
def test_greedy_chains_are_what_transformers_generates_with_the_adapter(adapted, policy, tokenizer):
    """
    Oracle: transformers' greedy decoding of the same PEFT model, draft and refinement. A prompt too long for the engine ends its chain with
    the reason.
    """
    *rows, long = adapted.rows("answers")
    assert long == {"prompt_id": "long", "answers": [], "stopped": "prompt_too_long"}
    assert [row["prompt_id"] for row in rows] == [row["prompt_id"] for row in SIX]
    for prompt, draft, row in zip(SIX, adapted.drafts, rows, strict=True):
        refined = greedy(policy, tokenizer, user(f"{prompt['prompt'][0]['content']} {draft}"))
        assert [answer["text"] for answer in row["answers"]] == [draft, refined]
    with policy.disable_adapter():
        assert greedy(policy, tokenizer, SIX[0]["prompt"]) != adapted.drafts[0]


@pytest.mark.vllm
def test_what_ends_and_shapes_an_answer(adapted, policy, tokenizer):
    """
    Oracles: transformers' greedy decoding, cut before a word or a token of its own; with its own repetition penalty; and at temperature
    1, if no token may be less likely than the likeliest, once more. Answers for the parity check end likewise.
    """
    drafts, word = adapted.drafts, adapted.word
    cases = ("stop", "stop_token_ids", "repetition_penalty", "min_p")
    found = {name: [row["answers"] for row in adapted.rows(name)] for name in cases}
    texts = {name: [[answer["text"] for answer in row] for row in rows] for name, rows in found.items()}

    cut = [draft.partition(word)[0].strip() for draft in drafts]
    assert all(cut[:4]) and cut != drafts and texts["stop"] == texts["stop_token_ids"] == [[text] * 2 for text in cut]
    for rows in (found["stop"], found["stop_token_ids"]):
        for draft, row in zip(drafts, rows, strict=True):
            assert row[0]["finish_reason"] == ("stop" if word in draft else "length")
    assert texts["min_p"] == [[text] * 2 for text in drafts]
    penalized = [greedy(policy, tokenizer, row["prompt"], repetition_penalty=1.5) for row in SIX]
    assert penalized != drafts and texts["repetition_penalty"] == [[text] * 2 for text in penalized]
    for row in adapted.rows("parity"):
        assert word not in tokenizer.decode(row["token_ids"][:-1]) and len(row["logps"]) == len(row["token_ids"])


# Without an adapter: one start of the engine answers everything, and a second one what is missing then


TEMPLATES = {
    "chain": {
        "template": ["{{ question }} Draft : {{ draft }} .", "{{ question }} {{ draft }} Write a better answer"]
    },
    "parallel": {},
    "few_shot": {"template": "{{ question }} {% for draft in drafts %}Draft : {{ draft }} . {% endfor %}"},
    "self_evaluation": {
        "template": "{{ question }} {{ draft }} : {{ critique }} Write a better answer",
        "evaluation_template": "{{ question }} Draft : {{ draft }}",
    },
}
HISTORY = [
    {"role": "system", "content": "Write . " * 64},
    *user("Sort : 2 1"),
    {"role": "assistant", "content": "1 2"},
]
QUESTIONS = [*SIX[:3], {"prompt_id": "history", "prompt": [*HISTORY, *user("Sort : 7 6")]}]
EQUAL = [{"prompt_id": str(i), "prompt": user("Sort : 2 1")} for i in range(6)]


@dataclass
class Plain:
    """What two starts of the engine answer. Some files were cut off after the first start, and continued by the second."""

    log: str  # of the first start
    greedy: dict[str, list[dict]]  # rows by strategy
    equal: list[dict]
    reversed: list[dict]
    whole: dict[str, bytes]  # sampled answers by strategy, before they were cut off
    continued: dict[str, bytes]
    chains: list[dict]  # rows of the greedy chains, some of them changed before they were cut off
    continued_chains: list[dict]


@pytest.fixture(scope="module")
def plain(tiny_model_path, tmp_path_factory) -> Plain:
    def directory(name: str) -> Path:
        return tmp_path_factory.mktemp(name)

    def cut_off(file: Path, part: str) -> None:
        file.with_name(file.name + ".part").write_text(part)
        file.unlink()

    engine = settings(tiny_model_path, max_model_len=240)
    turns = [DraftsConfig(temperature=0.0, max_tokens=tokens) for tokens in (8, 6, 7)]
    greedy_tasks = with_strategies(asked(directory("greedy"), QUESTIONS), TEMPLATES, turns)
    equal = asked(directory("equal"), EQUAL, temperature=1.0)
    sampled = with_strategies(
        asked(directory("sampled"), NINE),
        {name: TEMPLATES[name] for name in ("parallel", "self_evaluation")},
        [DraftsConfig(temperature=1.0, max_tokens=6)] * 3,
        answer_pattern=r"^\s*\d(.*)",  # some texts of a random model begin so, and some do not
    )
    with redirect_stdout(StringIO()) as log:
        run_engine(engine, [*greedy_tasks.values(), equal, *sampled.values()])
    greedy_rows = {name: read_jsonl(task.answers) for name, task in greedy_tasks.items()}

    whole = {name: task.answers.read_bytes() for name, task in sampled.items()}
    for task in sampled.values():
        lines = task.answers.read_text().splitlines(keepends=True)
        cut_off(task.answers, "".join(lines[2:5]) + lines[7][:30])
    # Two chains, the draft of a third, and a torn line
    chains = read_jsonl(greedy_tasks["chain"].answers)
    for row in chains[:2]:
        row["answers"][0]["text"] = "kept as it was found"
    chains[2]["answers"][0]["tokens"] = 99  # likewise
    drafts = [row | {"answers": row["answers"][:1]} for row in chains[1:3]]
    cut_off(
        greedy_tasks["chain"].answers,
        "".join(map(to_line, [chains[0], *drafts, chains[1]])) + json.dumps(chains[3])[:20],
    )
    reverse = asked(directory("reverse"), EQUAL[::-1][:4], temperature=1.0)
    run_engine(engine, [greedy_tasks["chain"], reverse, *sampled.values()])
    return Plain(
        log.getvalue(),
        greedy_rows,
        read_jsonl(equal.answers),
        read_jsonl(reverse.answers),
        whole,
        {name: task.answers.read_bytes() for name, task in sampled.items()},
        chains,
        read_jsonl(greedy_tasks["chain"].answers),
    )


@pytest.mark.vllm
def test_sampled_answers_depend_on_seed_and_prompt_only(plain):
    """The same requests in another order and batch give the same answers; equal prompts with other ids do not."""
    assert plain.reversed[::-1] == plain.equal[2:]
    assert len({row["answers"][0]["text"] for row in plain.equal}) > 1


@pytest.mark.vllm
def test_greedy_answers_of_every_strategy_are_what_transformers_generates(plain, tiny_model_path, tokenizer):
    """
    Oracle: transformers' greedy decoding, turn by turn, of prompts written out by hand. Of a conversation, the system message and the earlier
    turns stay; this one is long enough to fill a block of the prefix cache, 128 tokens on a CPU, which every later request of it then finds
    there.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    found = re.findall(r"([\d.]+)% of (\d+) prompt tokens came from the prefix cache", plain.log)[: len(TEMPLATES)]
    cached_tokens = [float(share) / 100 * int(total) for share, total in found]
    later_requests = [2, 3, 3, 5]  # of the long conversation: all but the first one of the first task
    assert all(cached > n * 127 for cached, n in zip(cached_tokens, later_requests, strict=True))

    for index, prompt in enumerate(QUESTIONS):
        before, question = prompt["prompt"][:-1], prompt["prompt"][-1]["content"]

        def ask(text: str, tokens: int, before=before) -> str:
            return greedy(model, tokenizer, [*before, *user(text)], tokens)

        y1 = ask(question, 8)
        chain2 = ask(f"{question} Draft : {y1} .", 6)
        few2 = ask(f"{question} Draft : {y1} . ", 6)
        c1 = ask(f"{question} Draft : {y1}", 6)
        self2 = ask(f"{question} {y1} : {c1} Write a better answer", 6)
        c2 = ask(f"{question} Draft : {self2}", 7)
        expected = {
            "chain": [y1, chain2, ask(f"{question} {chain2} Write a better answer", 7)],
            "parallel": [y1, ask(question, 6), ask(question, 7)],
            "few_shot": [y1, few2, ask(f"{question} Draft : {y1} . Draft : {few2} . ", 7)],
            "self_evaluation": [y1, self2, ask(f"{question} {self2} : {c2} Write a better answer", 7)],
        }
        rows = {name: answers[index] for name, answers in plain.greedy.items()}
        assert {name: [a["text"] for a in row["answers"]] for name, row in rows.items()} == expected
        assert [a.get("critique") for a in rows["self_evaluation"]["answers"]] == [c1, c2, None]
        assert all(row["stopped"] is None and row["prompt_id"] == prompt["prompt_id"] for row in rows.values())


@pytest.mark.vllm
def test_sampled_chains_with_critiques_and_missing_answers_are_continued(plain):
    """What is cut off in the middle of both files, and continued, ends with the bytes of what is not."""
    chains = {
        name: [Chain.from_row(json.loads(line), user("")) for line in lines.splitlines()]
        for name, lines in plain.whole.items()
    }
    for chain in chains["parallel"]:
        assert len(chain.answers) + len(chain.unanswered) == 3
        assert all(answer.full_text.strip()[1:].strip() == answer.text for answer in chain.answers)
    for chain in chains["self_evaluation"]:
        assert (chain.stopped == "no_answer_found") == (len(chain.answers) < 3) == bool(chain.unanswered)
        assert all(answer.critique is not None for answer in chain.answers[:2])
    for found in chains.values():
        assert any(chain.answers for chain in found) and any(chain.unanswered for chain in found)
    assert any(len({answer.full_text for answer in chain.answers}) > 1 for chain in chains["parallel"])
    assert plain.continued == plain.whole


@pytest.mark.vllm
def test_greedy_chains_are_continued(plain):
    """The answers that are there stay as they are; only the others are generated."""
    assert plain.continued_chains == plain.chains
