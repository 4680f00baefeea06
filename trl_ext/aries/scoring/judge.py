"""
A judge: a language model behind an OpenAI-compatible server compares the answers of a chain, two at a time.

Every two answers are compared twice, with their places swapped. An answer wins if it is called better in both places; anything else is a
tie, since judges prefer a place (https://huggingface.co/papers/2306.05685). The score of an answer is its win rate against the other
answers of its chain, in [0, 1]. So scores compare answers of one chain, and average 1/2 over it.
"""

import asyncio
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ...recipe import RecipeError
from ..children import ChildError
from ..config import ScorerConfig
from ..data.records import Answer, Chain, blocks
from ..generation.clients import APIError, APIStatusError, AsyncOpenAI, make_client, problem, without_key
from .scores import CHAINS_AT_ONCE, Block, Progress, ScoreCache, ScoreTask, chains_of, content_key, other_columns


VERDICTS = {"A": "first", "B": "second", "C": "tie"}
REFUSED_STATUS = {400, 413, 422}  # of one request, such as one longer than the judge's context
# Seconds for the list of a server's models, which not every server has
LONGEST_LISTING = 10.0


class JudgeError(ChildError):
    """The server failed permanently. Its verdicts are kept, and the same command continues."""


class RefusedComparison(JudgeError):
    """The server does not take this request, but may take others."""


class Judge:
    """
    Args:
        config ([`~aries.config.ScorerConfig`]):
            Its `judge`.

    Raises:
        [`RecipeError`]: the environment variable of the API key is not set, or the address is not a URL.
    """

    def __init__(self, config: ScorerConfig):
        self.name = config.name
        self.weight = config.weight
        self._config = judge = config.judge
        self._client()  # to raise its errors early
        self._template = ImmutableSandboxedEnvironment(undefined=StrictUndefined).from_string(judge.template)
        self._sampling = {
            key: getattr(judge, key) for key in ("temperature", "max_tokens") if getattr(judge, key) is not None
        }
        url = judge.base_url.rstrip("/") + "/chat/completions"
        self._identity = {"judge": url, "model": judge.model, **self._sampling}

    def request(self, chain: Chain, columns: dict[str, Any], first: Answer, second: Answer) -> str:
        """
        What the judge is asked about two answers.

        Raises:
            [`RecipeError`]: the template fails, for instance over a column that the prompts do not have.
        """
        prompt = chain.prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        variables = {**columns, "messages": messages, "question": messages[-1]["content"]}
        try:
            return self._template.render(variables, answer_a=first.text, answer_b=second.text)
        except Exception as error:  # the user's code: whatever it raises is reported with its place
            raise RecipeError(
                f"`judge.template`: {type(error).__name__}: {error}. It is given {', '.join(f'`{v}`' for v in variables)}, "
                "`answer_a` and `answer_b`."
            ) from error

    def comparisons(self, chain: Chain, columns: dict[str, Any]) -> Iterator[tuple[tuple[int, int], str, str]]:
        """Every two different answers of a chain in both orders: their indices, the key of the verdict, and the request."""
        for i, first in enumerate(chain.answers):
            for j, second in enumerate(chain.answers):
                if first.text != second.text:
                    request = self.request(chain, columns, first, second)
                    yield (i, j), content_key(self._identity, request), request

    def check(self, files: list[Sequence[dict[str, Any]]]) -> None:
        """
        Render the template, and ask the server to compare two words.

        Raises:
            [`RecipeError`]: one of them fails.
        """
        answers = [Answer(turn, text, 0, "stop") for turn, text in enumerate(("yes", "no"), start=1)]
        for rows in files:
            row, columns = rows[0], {name: rows[0].get(name) for name in other_columns(rows)}
            request = self.request(Chain(row["prompt_id"], row["prompt"]), columns, *answers)
        asyncio.run(self._try(request))

    async def _try(self, request: str) -> None:
        async with self._client().with_options(max_retries=0) as client:
            try:
                # A server that lists one model may answer under any name; one that lists several may have aliases for them
                timeout = min(self._config.timeout, LONGEST_LISTING)
                [name] = {model.id for model in (await client.models.list(timeout=timeout)).data}
            except (APIError, AttributeError, TypeError, ValueError):  # it has no such list
                name = self._config.model
            if name != self._config.model:
                raise RecipeError(
                    f"`scores`: the server at {self._config.base_url} has the model {name!r}, but the recipe asks for "
                    f"{self._config.model!r}. Set `judge.model`, or `judge.base_url` to another server."
                )
            try:
                await self._ask(client, request)
            except JudgeError as error:
                raise RecipeError(f"`scores`: {error}") from error

    def score(self, tasks: list[ScoreTask], cache: ScoreCache, progress: Progress) -> list[str]:
        """
        Raises:
            [`JudgeError`]: the server failed permanently; the verdicts so far are in the cache.
        """
        compared = judged = unparseable = 0
        total = sum(len(self._missing(block, cache)) for block in blocks(chains_of(tasks), CHAINS_AT_ONCE))
        for block in blocks(chains_of(tasks), CHAINS_AT_ONCE):
            missing = self._missing(block, cache)
            if missing:
                asyncio.run(self._judge(missing, cache, lambda done, judged=judged: progress(judged + done, total)))
            judged += len(missing)
            keys = [key for chain, columns in block for _, key, _ in self.comparisons(chain, columns)]
            compared += len(keys)
            unparseable += sum(cache[key] is None for key in keys)
        if not unparseable:
            return []
        return [f"{self.name}: {unparseable:,} of {compared:,} replies had no verdict and count as ties"]

    def _missing(self, chains: list[tuple[Chain, dict[str, Any]]], cache: ScoreCache) -> dict[str, str]:
        """The requests without a verdict in the cache, by key."""
        return {
            key: request
            for chain, columns in chains
            for _, key, request in self.comparisons(chain, columns)
            if key not in cache
        }

    def scores(self, block: Block, cache: ScoreCache) -> list[list[float | None]]:
        return [self._chain_scores(chain, columns, cache) for chain, columns in block]

    def _chain_scores(self, chain: Chain, columns: dict[str, Any], cache: ScoreCache) -> list[float | None]:
        verdicts = {pair: cache[key] for pair, key, _ in self.comparisons(chain, columns)}
        return win_rates(len(chain.answers), verdicts)

    async def _judge(self, missing: dict[str, str], cache: ScoreCache, progress: Callable[[int], None]) -> None:
        waiting, done = deque(missing.items()), count(1)

        async def work(client: AsyncOpenAI) -> None:
            try:
                while waiting:
                    key, request = waiting.popleft()
                    try:
                        reply = await self._ask(client, request)
                        verdict = read_verdict(reply)
                    except RefusedComparison as error:
                        reply, verdict = str(error), None
                    # A reply without a verdict is kept, to see why
                    cache.add([{"key": key, "verdict": verdict, **({} if verdict is not None else {"reply": reply})}])
                    progress(next(done))
            finally:
                waiting.clear()  # after an error, the others end with the requests that they have sent

        async with self._client() as client:
            workers = [work(client) for _ in range(min(self._config.max_concurrency, len(missing)))]
            for error in await asyncio.gather(*workers, return_exceptions=True):
                if error is not None:
                    raise error

    def _client(self) -> AsyncOpenAI:
        judge = self._config
        return make_client("judge.base_url", judge.base_url, judge.api_key_env, judge.timeout, judge.max_retries)

    async def _ask(self, client: AsyncOpenAI, request: str) -> str:
        """The server's reply, after the client's retries."""
        judge = self._config
        messages = [{"role": "user", "content": request}]
        try:
            reply = await client.chat.completions.create(model=judge.model, messages=messages, **self._sampling)
            content = reply.choices[0].message.content or ""
            # A server may escape half a character, which no file can hold
            return without_key(client, content.encode("utf-8", "replace").decode("utf-8"))
        except APIError as error:
            refused = isinstance(error, APIStatusError) and error.status_code in REFUSED_STATUS
            raise (RefusedComparison if refused else JudgeError)(
                f"the judge {judge.model} at {judge.base_url} failed ({problem(client, error)}). Check `base_url`, `model` and "
                "`api_key_env`, and whether the server runs; its verdicts are kept, and the same command continues."
            ) from None
        except (
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
        ) as error:  # the client takes any reply for a completion
            raise JudgeError(
                f"the judge {judge.model} at {judge.base_url} did not answer with a chat completion ({error}). "
                "`base_url` ends where `/chat/completions` begins, usually in /v1."
            ) from None


def read_verdict(reply: str) -> str | None:
    """
    `"first"`, `"second"` or `"tie"`, or `None` for a reply without a verdict. The last one counts: a judge may quote others before it.

    Example:

    ```python
    >>> read_verdict("[[B]] would be too hard on A. [[A]]")
    'first'
    ```
    """
    found = re.findall(r"\[\[([ABC])\]\]", reply)
    return VERDICTS[found[-1]] if found else None


def win_rates(answers: int, verdicts: dict[tuple[int, int], str | None]) -> list[float | None]:
    """
    Win rate of each answer against the others of its chain.

    Args:
        answers (`int`):
            Number of answers. A single one has nothing to win against, so it has no score.
        verdicts (`dict[tuple[int, int], str | None]`):
            Verdict of each comparison, by the answers in the first and the second place. Two that were never compared are equal, a tie.

    Example:

    ```python
    >>> win_rates(2, {(0, 1): "second", (1, 0): "first"})
    [0.0, 1.0]
    >>> win_rates(2, {(0, 1): "first", (1, 0): "first"})  # whoever comes first
    [0.5, 0.5]
    ```
    """
    if answers < 2:
        return [None] * answers

    def wins(i: int, j: int) -> bool:
        return verdicts.get((i, j)) == "first" and verdicts.get((j, i)) == "second"

    def points(i: int, j: int) -> float:
        return 1.0 if wins(i, j) else 0.0 if wins(j, i) else 0.5

    return [sum(points(i, j) for j in range(answers) if j != i) / (answers - 1) for i in range(answers)]
