"""
Types of values that several sections of a recipe have.
"""

import os
import re
from typing import Annotated, TypeVar

from pydantic import AfterValidator, Field

from ...recipe_checks import Texts


T = TypeVar("T")

# One value for all refinements, or a list with one for each
OneOrEach = T | list[T]

# A path, in which `~` is the home directory, or an id on the Hub
PathOrId = Annotated[str, AfterValidator(os.path.expanduser)]

# In [0, 1], and in (0, 1]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]

TopK = Annotated[int, Field(ge=-1)]  # vLLM takes 0 and -1 for off


def check_stop(texts: list[str]) -> list[str]:
    """Refuse texts that vLLM would refuse, or that no answer would contain."""
    for text in texts:
        if not text:
            raise ValueError('has an empty text. Name what ends an answer, such as "\\n".')
        if re.fullmatch(r"(\\[nrt])+", text):
            raise ValueError(
                f"has a backslash and a letter, {text}, as YAML reads '{text}' in single quotes. Write \"{text}\", in double quotes."
            )
    return texts


def check_pattern(pattern: str) -> str:
    """Refuse what is no regular expression with one group."""
    try:
        groups = re.compile(pattern).groups
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"is not a regular expression of Python: {error}. In YAML, put it in single quotes."
        ) from error
    if groups != 1:
        raise ValueError(f"has {groups} groups. Put ( ) around the answer, and write (?: ) for any other group.")
    return pattern


def check_url(url: str) -> str:
    """Refuse an address that is not a server's, or holds a secret, which is not shown."""
    if "@" in url or "?" in url:
        raise ValueError(
            "holds a user, a password or a query, and it is written down. Give the server's address alone, and a key through `api_key_env`."
        )
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"must start with http:// or https://, got {url!r}. An example is http://localhost:8000/v1.")
    return url


def check_env_name(name: str) -> str:
    """Refuse what cannot be the name of a variable, without showing it: it may be the key itself."""
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise ValueError(
            "is not the name of an environment variable, such as OPENAI_API_KEY. The key itself does not belong here."
        )
    return name


StopTexts = Annotated[Texts, AfterValidator(check_stop)]
ServerUrl = Annotated[str, AfterValidator(check_url)]
EnvName = Annotated[str, AfterValidator(check_env_name)]
