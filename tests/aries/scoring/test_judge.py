"""
The judge against a real HTTP server that speaks `/v1/chat/completions` and whose preference is known.
"""

import json
from dataclasses import asdict

import pytest
from tests.aries.model_server import ChatServer, running

from trl_ext.aries.children import ChildError
from trl_ext.aries.config import AriesConfig, EvaluationConfig, JudgeConfig, PromptsConfig, ScorerConfig, ScoresConfig
from trl_ext.aries.data.records import Answer, Chain, read_jsonl, write_json, write_jsonl
from trl_ext.aries.inputs import read_inputs
from trl_ext.aries.rounds import Rounds
from trl_ext.aries.scoring.judge import Judge, JudgeError, read_verdict, win_rates
from trl_ext.aries.scoring.scores import ScoreCache, ScoreTask, score_rows
from trl_ext.recipe import RecipeError


TEMPLATE = "{{ question }}\nA={{ answer_a }}\nB={{ answer_b }}"


def longer(a: str, b: str) -> str:
    return "[[C]]" if len(a) == len(b) else "[[A]]" if len(a) > len(b) else "[[B]]"


def serving(prefer=longer, **options):
    return running(ChatServer(prefer, **options))


def judge(url, **options):
    options = {"template": TEMPLATE, "max_retries": 1} | options
    return Judge(ScorerConfig(judge=JudgeConfig(base_url=url, model="m", **options)))


def write_task(path, *texts) -> ScoreTask:
    """A chain for each list of answers."""
    prompts = [{"prompt_id": str(i), "prompt": f"question {i}"} for i in range(len(texts))]
    chains = [
        Chain(row["prompt_id"], row["prompt"], [Answer(k, text, 1, "stop") for k, text in enumerate(chain, start=1)])
        for row, chain in zip(prompts, texts, strict=True)
    ]
    write_jsonl(path / "prompts.jsonl", prompts)
    write_jsonl(path / "answers.jsonl", (chain.to_row() for chain in chains))
    return ScoreTask(path / "prompts.jsonl", path / "answers.jsonl")


def score(scorer, task, tmp_path):
    cache = ScoreCache(tmp_path / "cache.jsonl")
    notes = scorer.score([task], cache, lambda done, total: None)
    return [row["scores"] for row in score_rows(task, [scorer], cache)], notes


def test_win_rates():
    """
    Three answers. 0 beats 1 in both places; 1 and 2 each win in the first place, a tie; 2 against 0 has no verdict in one
    place, a tie. So 0 has (1 + 1/2) / 2, 1 has (0 + 1/2) / 2 and 2 has (1/2 + 1/2) / 2.
    """
    verdicts = {(0, 1): "first", (1, 0): "second", (1, 2): "first", (2, 1): "first", (2, 0): None, (0, 2): "first"}
    assert win_rates(3, verdicts) == [0.75, 0.25, 0.5]
    assert win_rates(2, {(0, 1): "tie", (1, 0): "first"}) == [0.5, 0.5]
    assert win_rates(3, {}) == [0.5, 0.5, 0.5]
    assert win_rates(1, {}) == [None] and win_rates(0, {}) == []


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("[[A]]", "first"),
        ("so\n[[B]].", "second"),
        ("[[C]]", "tie"),
        ("[[A]], no: [[B]]", "second"),
        ("A", None),
        ("", None),
    ],
)
def test_verdicts(reply, verdict):
    assert read_verdict(reply) == verdict


def test_the_longer_answer_wins(tmp_path):
    """Of 1, 3 and 2 words the rates are 0, 1 and 1/2; equal answers tie unasked; a lone one has no score."""
    task = write_task(tmp_path, ["a", "a a a", "a a"], ["b", "b"], ["c"])
    with serving() as server:
        scorer = judge(server.url, max_concurrency=4, temperature=None)
        scores, notes = score(scorer, task, tmp_path)
        assert scores == [[0.0, 1.0, 0.5], [0.5, 0.5], [None]] and notes == []
        assert len(server.requests) == 6  # three pairs, both orders
        request = {"model": "m", "max_tokens": 1024}
        assert all({k: v for k, v in body.items() if k != "messages"} == request for body in server.requests)
        texts = sorted(body["messages"][0]["content"] for body in server.requests)
        assert texts[0] == "question 0\nA=a\nB=a a" and len(set(texts)) == 6

        # Once more, from the cache
        assert score(scorer, task, tmp_path) == (scores, [])
        assert len(server.requests) == 6


def test_a_judge_that_prefers_a_place_says_nothing(tmp_path):
    with serving(prefer=lambda a, b: "The first one. [[A]]") as server:
        scores, _ = score(judge(server.url), write_task(tmp_path, ["a", "b b"]), tmp_path)
    assert scores == [[0.5, 0.5]]


def test_replies_without_a_verdict_are_counted_and_kept(tmp_path):
    with serving(prefer=lambda a, b: "Hard to say." if "x" in a else longer(a, b)) as server:
        scores, notes = score(judge(server.url), write_task(tmp_path, ["x", "b b", "b b b"]), tmp_path)
    assert scores == [[0.5, 0.25, 0.75]]
    assert notes == ["judge: 2 of 6 replies had no verdict and count as ties"]
    rows = [json.loads(line) for line in (tmp_path / "cache.jsonl").read_text().splitlines()]
    assert [row["reply"] for row in rows if row["verdict"] is None] == ["Hard to say."] * 2


def test_a_request_that_the_server_refuses_is_a_tie(tmp_path):
    with serving(fail=lambda n: 400 if n == 1 else 200) as server:
        scores, notes = score(judge(server.url, max_concurrency=1), write_task(tmp_path, ["a", "b b"]), tmp_path)
    assert scores == [[0.5, 0.5]]
    assert notes == ["judge: 1 of 2 replies had no verdict and count as ties"]


def test_busy_servers_are_asked_again(tmp_path):
    with serving(fail=lambda n: 503 if n % 2 else 200, retry_after="0.01") as server:
        scores, _ = score(judge(server.url, max_concurrency=1), write_task(tmp_path, ["a", "b b"]), tmp_path)
        assert scores == [[0.0, 1.0]] and len(server.requests) == 4


def test_a_server_that_dies_keeps_what_it_judged(tmp_path):
    """It fails from request 6 on; the next run asks only for what is missing."""
    task = write_task(tmp_path, *(["a", "a" * n] for n in range(2, 7)))
    with serving(fail=lambda n: 500 if n > 5 else 200) as server:
        with pytest.raises(JudgeError, match=f"the judge m at {server.url} failed .*status 500"):
            score(judge(server.url, max_concurrency=2, max_retries=0), task, tmp_path)
        kept = len(ScoreCache(tmp_path / "cache.jsonl"))
        assert kept == 5
        server.fail = lambda n: 200
        server.requests.clear()
        scores, _ = score(judge(server.url), task, tmp_path)
        assert scores == [[0.0, 1.0]] * 5 and len(server.requests) == 10 - kept


class TestCheck:
    prompts = [{"prompt_id": "p", "prompt": [{"role": "user", "content": "2 + 2"}], "solution": "4"}]

    def test_a_server_that_answers(self):
        with serving() as server:
            judge(server.url).check([self.prompts, self.prompts])
            assert len(server.requests) == 1

    def test_no_server(self):
        with serving() as server:
            url = server.url
        with pytest.raises(RecipeError, match=f"the judge m at {url} failed .*ConnectError"):
            judge(url).check([self.prompts])
        with pytest.raises(RecipeError, match="`judge.base_url`"):
            judge("http://127.0.0.1:port/v1")

    def test_another_path(self):
        with serving() as server, pytest.raises(RecipeError, match="status 404.*Check `base_url`"):
            judge(server.url.removesuffix("/v1")).check([self.prompts])

    def test_the_key_is_sent_and_missed(self, monkeypatch):
        monkeypatch.setenv("A_KEY", "secret")
        with serving(key="secret") as server:
            judge(server.url, api_key_env="A_KEY").check([self.prompts])
            with pytest.raises(RecipeError, match="status 401"):
                judge(server.url).check([self.prompts])
        with pytest.raises(RecipeError, match="`judge.api_key_env`.*NO_KEY"):
            judge("http://127.0.0.1", api_key_env="NO_KEY")

    def test_templates_get_the_columns(self):
        template = "{{ messages[0].content }} = {{ solution }}\nA={{ answer_a }}\nB={{ answer_b }}"
        with serving() as server:
            judge(server.url, template=template).check([self.prompts])
            assert server.requests[0]["messages"][0]["content"] == "2 + 2 = 4\nA=yes\nB=no"
        with pytest.raises(RecipeError, match="`judge.template`: UndefinedError: 'reference' is undefined"):
            judge(server.url, template=TEMPLATE + "{{ reference }}").check([self.prompts])

    def test_our_template(self):
        with serving(prefer=lambda a, b: "[[A]]") as server:
            scorer = Judge(ScorerConfig(judge=JudgeConfig(base_url=server.url, model="m")))
            chain = Chain("p", self.prompts[0]["prompt"])
            text = scorer.request(chain, {}, Answer(1, "four", 1, "stop"), Answer(2, "five", 1, "stop"))
        assert "[Conversation]\nuser: 2 + 2\n\n[Answer A]\nfour\n\n[Answer B]\nfive\n\nExplain" in text
        assert text.endswith("[[C]] for a tie.")


class TestStage:
    """The loop's stage `scores`, a verifier and a judge together, on answers that are there."""

    @pytest.fixture
    def loop(self, tmp_path):
        """A function that makes the loop for a server, with answers of round 1 to score."""
        verifier = tmp_path / "v.py"
        verifier.write_text(
            "def f(prompts, completions, right, **kwargs):\n"
            "    with open(__file__ + '.calls', 'a') as file:\n"
            "        file.writelines(f'{c}\\n' for c in completions)\n"
            "    return [float(c == r) for c, r in zip(completions, right)]\n"
        )
        rows = [{"prompt": f"question {i}", "right": "a a"} for i in range(4)]
        for name in ("train", "eval"):
            write_jsonl(tmp_path / f"{name}.jsonl", rows)

        def make(url):
            config = AriesConfig(
                output_dir=str(tmp_path / "run"),
                model={"model_name_or_path": "m"},
                prompts=PromptsConfig(str(tmp_path / "train.jsonl")),
                evaluation=EvaluationConfig(str(tmp_path / "eval.jsonl")),
                training={},
                rounds=1,
                scores=ScoresConfig(
                    scorers=[
                        ScorerConfig(verifier=f"{verifier}:f", weight=2.0),
                        ScorerConfig(
                            judge=JudgeConfig(base_url=url, model="m", template=TEMPLATE, max_retries=0), name="longer"
                        ),
                    ]
                ),
            )
            return Rounds(config, read_inputs(config))

        def prepare(url):
            loop = make(url)
            for number in (0, 1):
                loop.dir.round(number).path.mkdir(parents=True, exist_ok=True)
            write_json(loop.dir.resolved, asdict(loop.config))
            write_jsonl(loop.dir.evaluation_prompts, loop.inputs.evaluation_prompts)
            write_jsonl(loop.dir.round(1).prompts, loop.inputs.prompts)
            for file, texts in ((loop.dir.round(0).evaluation, "abc"), (loop.dir.round(1).answers, ["a", "a a"])):
                answers = [
                    {"turn": k, "text": t, "tokens": 1, "finish_reason": "stop"} for k, t in enumerate(texts, 1)
                ]
                ids = [row["prompt_id"] for row in read_jsonl(loop.dir.evaluation_prompts)]
                if file == loop.dir.round(1).answers:
                    ids = [row["prompt_id"] for row in read_jsonl(loop.dir.round(1).prompts)]
                write_jsonl(file, ({"prompt_id": i, "answers": answers, "stopped": None} for i in ids))
            return loop

        return prepare

    def test_both_count_and_nothing_is_scored_twice(self, loop, tmp_path):
        """Round 1: `a` is wrong and shorter, 2 * 0 + 0; `a a` is right and longer, 2 * 1 + 1."""
        with serving() as server:
            stage = loop(server.url)
            stage.score(answering=0)
            scores = stage.dir.round(1).scores
            rows = read_jsonl(scores)
            assert [row["scores"] for row in rows] == [[0.0, 3.0]] * 4
            assert rows[0]["by_scorer"] == {"verifier": [0.0, 1.0], "longer": [0.0, 1.0]}
            asked, called = len(server.requests), (tmp_path / "v.py.calls").read_text()
            assert asked == 4 * 2 + 4 * 6  # two answers of a training chain, three of an evaluation chain
            content = scores.read_bytes()
            scores.unlink()
            loop(server.url).score(answering=0)
            assert scores.read_bytes() == content
            assert (len(server.requests), (tmp_path / "v.py.calls").read_text()) == (asked, called)

    def test_a_server_that_dies_ends_the_stage_and_the_next_run_goes_on(self, loop):
        with serving(fail=lambda n: 500 if n > 7 else 200) as server:
            stage = loop(server.url)
            with pytest.raises(ChildError, match="the same command continues"):
                stage.score(answering=0)
            assert not stage.dir.round(1).scores.exists()
            kept = sum("verdict" in row for row in read_jsonl(stage.dir.score_cache))
            assert kept == 7
            server.fail = lambda n: 200
            server.requests.clear()
            loop(server.url).score(answering=0)
            assert len(server.requests) == 32 - kept
            assert [row["scores"] for row in read_jsonl(stage.dir.round(1).scores)] == [[0.0, 3.0]] * 4


@pytest.mark.parametrize("models", [(), ("m",), ("other", "m"), ("other", "another")])
def test_a_server_that_may_have_the_model_is_asked(models):
    """One that lists several may have an alias for it; this one answers under any name."""
    with serving(models=models) as server:
        judge(server.url).check([[{"prompt_id": "0", "prompt": "q"}]])
        assert len(server.requests) == 1


def test_a_server_with_another_model_is_refused_before_any_work():
    with serving(models=("other",)) as server:
        with pytest.raises(RecipeError, match="has the model 'other'.*`judge.model`"):
            judge(server.url).check([[{"prompt_id": "0", "prompt": "q"}]])
        assert server.requests == []


@pytest.mark.parametrize("content", [["a"], {"a": 1}, 5])
def test_a_reply_that_is_no_text_is_named(content, tmp_path):
    with serving(prefer=lambda a, b: content) as server:
        task = write_task(tmp_path, ["a", "bb"])
        with pytest.raises(JudgeError, match=f"the judge m at {server.url} did not answer with"):
            score(judge(server.url), task, tmp_path)
