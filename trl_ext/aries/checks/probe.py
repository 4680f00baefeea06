"""
The probe: what servers have to agree with before they are used.

In: a round's policy, and a few of the evaluation prompts. Out: the trainer's log-probabilities of their tokens under that policy, and
under those that a server might have by mistake (`parity_probe.json`). Computed as in `parity.py`, in a process that gives its memory back.
"""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from ..children import Reporter, child_main
from ..data.records import read_jsonl, write_json
from ..generation.drafts import encode_prompt
from .parity import TOLERANCES, engine_quantization, first_names, load_base, policy_logps


# Enough tokens to tell policies apart, and about a second for a server: of each of so many prompts, so many tokens
PROBE_PROMPTS, PROBE_TOKENS = 8, 8
LONGEST_TEXT = 256


def served_dtype(dtype: str, model: str, **loading: Any) -> str:
    """The data type of the servers' weights: for `auto`, vLLM's choice."""
    if dtype != "auto":
        return dtype
    checkpoint = str(AutoConfig.from_pretrained(model, **loading).dtype).removeprefix("torch.")
    return checkpoint if checkpoint in ("bfloat16", "float16") else "bfloat16"


def main(job: dict[str, Any], report: Reporter) -> None:
    """The child process."""
    loading = dict(job["loading"])
    policies = job["policies"]
    of_model = {key: loading[key] for key in ("revision", "trust_remote_code")}
    model = policies["policy"]["model"]
    tokenizer = AutoTokenizer.from_pretrained(model, **of_model)
    longest = min(LONGEST_TEXT, job["max_model_len"] - 1)
    prompts = read_jsonl(Path(job["prompts"]))[:PROBE_PROMPTS]
    texts = [encode_prompt(tokenizer, row["prompt"])[:longest] for row in prompts]
    texts = [text for text in texts if len(text) > 1]
    rows = [{"prompt_token_ids": text[:1], "token_ids": text[1:]} for text in texts]
    dtype = served_dtype(job["dtype"], model, **of_model)
    quantization = engine_quantization(job["quantization"], dtype)

    def load(path: str) -> PreTrainedModel:
        return load_base(path, dtype, quantization, **loading)

    names = dict.fromkeys(first_names(policies).values())
    logps = policy_logps({name: policies[name] for name in names}, rows, load)
    positions = [spread(len(text)) for text in texts]
    write_json(
        Path(job["output"]),
        {
            "dtype": dtype,
            "tolerance": TOLERANCES[dtype] if job["tolerance"] is None else job["tolerance"],
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
    Positions of tokens to look at in a text, evenly over it; the first one has nothing before it.

    Example:

    ```python
    >>> spread(5), spread(17)
    ([1, 2, 3, 4], [2, 4, 6, 8, 10, 12, 14, 16])
    ```
    """
    count = min(length - 1, PROBE_TOKENS)
    return [(index + 1) * (length - 1) // count for index in range(count)]


if __name__ == "__main__":
    child_main(main)
