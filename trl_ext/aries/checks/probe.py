"""
The probe: what servers must agree with before they are used.

In: a round's policy, and a few of the evaluation prompts. Out: the trainer's log-probabilities of their tokens under that policy, and
under those that a server might have by mistake (`parity_probe.json`). Computed as in `parity.py`.
"""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from ..data.records import read_jsonl, write_json
from ..generation.drafts import encode_prompt
from ..policies import Comparison
from .parity import TOLERANCES, distinct_logps


# Prompts, and tokens of each: enough to distinguish policies, in about a second of a server's time
PROBE_PROMPTS, PROBE_TOKENS = 8, 8
LONGEST_TEXT = 256


def served_dtype(dtype: str, model: str, **loading: Any) -> str:
    """The data type of the servers' weights: for `auto`, vLLM's choice."""
    if dtype != "auto":
        return dtype
    checkpoint = str(AutoConfig.from_pretrained(model, **loading).dtype).removeprefix("torch.")
    return checkpoint if checkpoint in ("bfloat16", "float16") else "bfloat16"


def write_probe(comparison: Comparison, prompts: Path, output: Path, dtype: str, max_model_len: int) -> None:
    """
    Args:
        comparison ([`~aries.policies.Comparison`]):
            The policy, and those that a server might have instead.
        prompts (`Path`), output (`Path`):
            The evaluation prompts, and where the probe goes.
        dtype (`str`), max_model_len (`int`):
            `generation.dtype` and `generation.max_model_len`.
    """
    loading = {"revision": comparison.revision, "trust_remote_code": comparison.trust_remote_code}
    model = comparison.policies["policy"].model
    tokenizer = AutoTokenizer.from_pretrained(model, **loading)
    longest = min(LONGEST_TEXT, max_model_len - 1)
    texts = [encode_prompt(tokenizer, row["prompt"])[:longest] for row in read_jsonl(prompts)[:PROBE_PROMPTS]]
    texts = [text for text in texts if len(text) > 1]
    rows = [{"prompt_token_ids": text[:1], "token_ids": text[1:]} for text in texts]
    dtype = served_dtype(dtype, model, **loading)
    logps = distinct_logps(comparison, rows, dtype)
    positions = [spread(len(text)) for text in texts]
    write_json(
        output,
        {
            "dtype": dtype,
            "tolerance": TOLERANCES[dtype] if comparison.tolerance is None else comparison.tolerance,
            "texts": [{"token_ids": text, "positions": chosen} for text, chosen in zip(texts, positions, strict=True)],
            "logps": {
                name: [
                    text[position - 1].item()
                    for text, chosen in zip(values, positions, strict=True)
                    for position in chosen
                ]
                for name, values in logps.items()
            },
        },
    )


def spread(length: int) -> list[int]:
    """
    Positions of the tokens of a text to compare, spread evenly. The first token is left out, since nothing precedes it.

    Example:

    ```python
    >>> spread(5), spread(17)
    ([1, 2, 3, 4], [2, 4, 6, 8, 10, 12, 14, 16])
    ```
    """
    count = min(length - 1, PROBE_TOKENS)
    return [(index + 1) * (length - 1) // count for index in range(count)]
