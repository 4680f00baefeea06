"""
A judge: a language model behind an OpenAI-compatible server compares the answers of a chain, two at a time.

Each two are compared twice, with their places swapped: an answer wins where it is called better in both places, and anything
else is a tie, since judges prefer a place (https://huggingface.co/papers/2306.05685). The score of an answer is its win rate
against the other answers of its chain, in [0, 1]. So scores compare answers of one chain, and average 1/2 over it.
"""

import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ...recipe import RecipeError
from ..children import ChildError
from ..config import ScorerConfig
from ..data.records import Answer, Chain, blocks
from ..generation.waits import retry_after
from .scores import CHAINS_AT_ONCE, Block, Progress, ScoreCache, ScoreTask, chains_of, content_key, other_columns


VERDICTS = {"A": "first", "B": "second", "C": "tie"}
RETRIED_STATUS = {408, 409, 429}  # and those of 500 and above
REFUSED_STATUS = {400, 413, 422}  # of one request, such as one longer than the judge's context
LONGEST_WAIT = 60.0
# Seconds for the list of a server's models, which not every server has
LONGEST_LISTING = 10.0
# What a server may say in an error
SHOWN_CHARACTERS = 300


class JudgeError(ChildError):
    """The server failed for good. What it judged is kept, and running again goes on from there."""


class RefusedRequest(JudgeError):
    """The server does not take this request, but may take others."""


class Judge:
    """
    Args:
        config ([`~aries.config.ScorerConfig`]):
            Its `judge`.

    Raises:
        [`RecipeError`]: the environment variable of the API key is not set.
    """

    def __init__(self, config: ScorerConfig):
        self.name = config.name
        self.weight = config.weight
        self._config = judge = config.judge
        self._url = judge.base_url.rstrip("/") + "/chat/completions"
        self._headers, self._key = {}, None
        if judge.api_key_env is not None:
            if not os.environ.get(judge.api_key_env):
                raise RecipeError(
                    f"`judge.api_key_env`: the environment variable {judge.api_key_env} is not set. Export the key "
                    f"under this name, or leave `api_key_env` out for a server that needs none."
                )
            self._key = os.environ[judge.api_key_env]
            self._headers = {"Authorization": f"Bearer {self._key}"}
        self._template = ImmutableSandboxedEnvironment(undefined=StrictUndefined).from_string(judge.template)
        self._sampling = {
            key: getattr(judge, key) for key in ("temperature", "max_tokens") if getattr(judge, key) is not None
        }
        self._identity = {"judge": self._url, "model": judge.model, **self._sampling}
        self._stopping = threading.Event()

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
        """Each two different answers of a chain in both orders: their indices, the key of the verdict, and the request."""
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
        with self._client() as client:
            other = self._other_model(client)
            if other is not None:
                raise RecipeError(
                    f"`scores`: the server at {self._config.base_url} has the model {other!r}, and the recipe asks for "
                    f"{self._config.model!r}. Set `judge.model`, or `judge.base_url` to another server."
                )
            try:
                self._ask(client, request, retries=0)
            except JudgeError as error:
                raise RecipeError(f"`scores`: {error}") from error

    def score(self, tasks: list[ScoreTask], cache: ScoreCache, progress: Progress) -> list[str]:
        """
        Raises:
            [`JudgeError`]: the server failed for good; the verdicts until then are in the cache.
        """
        compared = judged = unparseable = 0
        total = sum(len(self._missing(block, cache)) for block in blocks(chains_of(tasks), CHAINS_AT_ONCE))
        for block in blocks(chains_of(tasks), CHAINS_AT_ONCE):
            missing = self._missing(block, cache)
            if missing:
                self._judge(missing, cache, lambda done, judged=judged: progress(judged + done, total))
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

    def _judge(self, missing: dict[str, str], cache: ScoreCache, progress: Callable[[int], None]) -> None:
        self._stopping.clear()
        failure = None
        with self._client() as client, ThreadPoolExecutor(self._config.max_concurrency) as pool:
            asked = {pool.submit(self._ask, client, request): key for key, request in missing.items()}
            try:
                for done, future in enumerate(as_completed(asked), start=1):
                    error = future.exception()
                    if error is not None and not isinstance(error, RefusedRequest):
                        failure = failure or error
                        self._stopping.set()  # what is waiting gives up; what was answered is still kept
                        continue
                    reply = str(error) if error is not None else future.result()
                    verdict = None if error is not None else read_verdict(reply)
                    # A reply without a verdict is kept, to see why
                    shown = {} if verdict is not None else {"reply": reply}
                    cache.add([{"key": asked[future], "verdict": verdict, **shown}])
                    progress(done)
            finally:
                self._stopping.set()
        if failure is not None:
            raise failure

    def _client(self) -> Any:
        import httpx  # through huggingface_hub in every installation

        limits = httpx.Limits(max_connections=self._config.max_concurrency)
        return httpx.Client(headers=self._headers, timeout=self._config.timeout, limits=limits)

    def _other_model(self, client: Any) -> str | None:
        """
        The one model that the server lists, where it is another one: such a server may answer under any name. One that lists
        several, which may have aliases, or none has to be asked.
        """
        import httpx

        try:
            url = self._config.base_url.rstrip("/") + "/models"
            listed = client.get(url, timeout=min(self._config.timeout, LONGEST_LISTING)).json()["data"]
            [name] = {model["id"] for model in listed}
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError):
            return None
        return None if name == self._config.model else str(name)

    def _ask(self, client: Any, request: str, retries: int | None = None) -> str:
        """The server's reply, after retries with growing waits."""
        import httpx

        body = {"model": self._config.model, "messages": [{"role": "user", "content": request}], **self._sampling}
        retries = self._config.max_retries if retries is None else retries
        problem, failure = "another request failed", JudgeError
        for attempt in range(retries + 1):
            if self._stopping.is_set():
                break
            wait = min(0.5 * 2**attempt, LONGEST_WAIT)
            try:
                response = client.post(self._url, json=body)
            except (httpx.RequestError, httpx.InvalidURL) as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if response.status_code == 200:
                    return self._content(response)
                problem = f"status {response.status_code}: {self._shown(response.text)}"
                if response.status_code in REFUSED_STATUS:
                    failure = RefusedRequest
                if response.status_code < 500 and response.status_code not in RETRIED_STATUS:
                    break
                asked_for = retry_after(response.headers)
                wait = wait if asked_for is None else asked_for
            if attempt < retries:
                self._stopping.wait(wait)
        raise failure(
            f"the judge {self._config.model} at {self._url} failed ({problem}). Look at `base_url`, `model` and "
            "`api_key_env`, and whether the server runs; what it has judged is kept, and the same command goes on."
        )

    def _content(self, response: Any) -> str:
        try:
            content = response.json()["choices"][0]["message"]["content"] or ""
            # What a server escapes need not be whole characters, which a file must have
            return self._without_key(content.encode("utf-8", "replace").decode("utf-8"))
        except (ValueError, LookupError, TypeError, AttributeError):
            raise JudgeError(
                f"{self._url} answered with something else than a chat completion: {self._shown(response.text)}. "
                "`base_url` ends where `/chat/completions` begins, usually in /v1."
            ) from None

    def _shown(self, text: str) -> str:
        return self._without_key(text)[:SHOWN_CHARACTERS]

    def _without_key(self, text: str) -> str:
        """A server may quote the key that it was sent; neither an error nor a file of the run repeats it."""
        return text if self._key is None else text.replace(self._key, "***")


def read_verdict(reply: str) -> str | None:
    """
    `"first"`, `"second"` or `"tie"`, or `None` for a reply without a verdict. The last one counts: a judge may quote the
    others on its way.

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
            Number of answers. A single one has nothing to win against, and no score.
        verdicts (`dict[tuple[int, int], str | None]`):
            Of each comparison, by the answer in the first place and the one in the second. Two that were never compared
            are equal, a tie.

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
