"""
Pages: HTML that stands alone, without scripts and without anything to load, so that it can be sent to someone.

What models wrote goes through Jinja2's autoescape, and invisible characters are shown as escapes.
"""

import re
import time
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import trl_ext

from ...recipe import RecipeError
from ..data.records import write_atomically
from .progress import duration


# What a browser would act on or not show: controls except tab and newline, what reorders text, lone surrogates, tags
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)


def write_page(target: Path, template: str, **values: Any) -> Path:
    """
    Render a template of this package into a file, and return its path.

    Raises:
        [`RecipeError`]: the file is there and is not one of this package's pages.
    """
    if target.exists() and "by trl-ext" not in target.read_text(encoding="utf-8", errors="replace")[-500:]:
        raise RecipeError(f"{target} was not written by trl-ext, and is not overwritten. Move it out of the way.")
    environment = Environment(
        loader=PackageLoader("trl_ext.aries.results", "."),
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,  # markup stays as it is
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "duration": duration,
        "decimals": decimals,
        "signed": partial(decimals, sign="+"),
        "interval": interval,
        "slug": lambda text: re.sub(r"\W+", "-", text.lower()),
        "gigabytes": lambda count: f"{count / 1e9:,.1f} GB",
        "capital": lambda text: text[:1].upper() + text[1:],
    }
    values |= {"written": time.strftime("%Y-%m-%d %H:%M %z"), "version": trl_ext.__version__}
    write_atomically(target, [environment.get_template(template).render(values)])
    return target


def visible(text: str) -> str:
    """The text with controls, characters that reorder text, and lone surrogates as escapes such as `\\x1b`."""

    def escaped(match: re.Match) -> str:
        code = ord(match.group())
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

    return _UNSEEN.sub(escaped, text.replace("\r\n", "\n"))


def decimals(value: float | None, sign: str = "") -> str:
    """Three decimals, two from 10, none from 1,000, three digits below a hundredth; a dash for nothing."""
    if value is None:
        return "–"
    digits = 3 if abs(value) < 10 else 2 if abs(value) < 1000 else 0
    text = f"{value:{sign}.3g}" if 0 < abs(value) < 0.01 else f"{value:{sign},.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def interval(bounds: list[float] | None) -> str:
    return "" if bounds is None else f"[{decimals(bounds[0])}, {decimals(bounds[1])}]"
