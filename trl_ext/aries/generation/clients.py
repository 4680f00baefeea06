"""
Asks servers, those that generate and those that judge, through the `openai` client.

In: a server's address, and the name of the variable that holds its key. Out: a client that sends to this address alone, and what its errors
say, without the key. Other modules import the package's names from here, so that an error says what to install.
"""

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from ...recipe import RecipeError


try:
    from httpx2 import InvalidURL, Limits, Response, Timeout
    from openai import APIError, APIStatusError, AsyncOpenAI, DefaultAsyncHttpxClient
    from openai.types import Completion
except ImportError as error:
    raise RecipeError(
        "`generation.base_urls` and `judge` need the package `openai`: `pip install 'openai>=3'`, or this package's extra `servers`."
    ) from error


__all__ = [
    "APIError",
    "APIStatusError",
    "AsyncOpenAI",
    "Completion",
    "Response",
    "make_client",
    "problem",
    "retry_after",
    "without_key",
]

LONGEST_CONNECT = 10.0
# Below the 5 s after which vLLM's HTTP server closes an idle connection: a request sent at that moment would be lost
LONGEST_IDLE = 2.0
LONGEST_ASKED = 600.0
# Characters of a server's reply that an error shows
SHOWN_CHARACTERS = 300
# The client insists on a key
NO_KEY = "no-key-was-given"


def make_client(url_key: str, base_url: str, api_key_env: str | None, timeout: float, max_retries: int) -> AsyncOpenAI:
    """
    A client for the server at `base_url`, for the recipe's key `url_key`. It follows no redirects. The only key it sends is that in the
    variable `api_key_env`, never `OPENAI_API_KEY` or another from the environment.

    Raises:
        [`RecipeError`]: the variable is not set, or the address is not a URL.
    """
    if api_key_env is not None and not os.environ.get(api_key_env):
        raise RecipeError(
            f"`{url_key.partition('.')[0]}.api_key_env`: the environment variable {api_key_env} is not set. Export the key under this name, or leave "
            "`api_key_env` out if the server needs no key."
        )
    try:
        return AsyncOpenAI(
            base_url=base_url,
            api_key=NO_KEY if api_key_env is None else os.environ[api_key_env],
            admin_api_key="",
            organization="",
            project="",
            timeout=Timeout(timeout, connect=min(timeout, LONGEST_CONNECT)),
            max_retries=max_retries,
            http_client=DefaultAsyncHttpxClient(
                follow_redirects=False, limits=Limits(max_connections=None, keepalive_expiry=LONGEST_IDLE)
            ),
        )
    except InvalidURL as error:
        raise RecipeError(f"`{url_key}`: {base_url!r} is not a URL: {error}.") from error


def without_key(client: AsyncOpenAI, text: str) -> str:
    """A server may quote the key that it was sent; neither an error nor a file of the run repeats it."""
    return text.replace(client.api_key, "***")


def problem(client: AsyncOpenAI, error: APIError) -> str:
    """What went wrong with a request, in a line."""
    if isinstance(error, APIStatusError):
        text = without_key(client, error.response.text)
        return f"{error.request.url.path}: status {error.status_code}: {text[:SHOWN_CHARACTERS]}"
    cause = error.__cause__ or error  # the HTTP library's error, behind an `APIConnectionError`
    return f"{type(cause).__name__}: {cause}".removesuffix(": ")


def retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """
    Seconds until a server wants to be asked again, by its `Retry-After`: a number or a date (RFC 9110, section 10.2.3), ten minutes at
    most; `None` if it does not say.
    """
    text = headers.get("retry-after", "").strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(text) - (now or datetime.now(UTC))).total_seconds()
        except (ValueError, TypeError):  # not a date, or one without a time zone
            return None
    return min(max(seconds, 0.0), LONGEST_ASKED) if seconds == seconds else None
