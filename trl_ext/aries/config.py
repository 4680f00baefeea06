"""
What an ARIES recipe says, one dataclass per section, in the order of the data.

The sections `model`, `sft` and `training` hold the keys of TRL's `ModelConfig`, of `SFTConfig` and of the trainer's own
config, spelled as there; they are validated against those classes by `preflight.py` and kept as mappings here, since
constructing them starts accelerate.
"""

import math
import os
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from jinja2 import Environment
from jinja2.meta import find_undeclared_variables

from .templates import EVALUATION_TEMPLATE, TEMPLATES, check_evaluation_template, check_refinement_template


# The largest LoRA rank that vLLM serves
MAX_LORA_RANK = 512

# Keys of `training` that are the loop's own, not the trainer's
LOOP_KEYS = ("trainer", "reference", "objective", "objective_alpha", "accelerate_config", "num_processes")

# α of the squared objective: the paper's was not available to us, and two public relatives have this one. [house]
OBJECTIVE_ALPHA = 0.8

# Of a refinement, each may have its own; the strings and tokens that end an answer are the same for all
SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens")
STOP_KEYS = ("stop", "stop_token_ids")

# [house], after the pairwise prompt of MT-Bench (https://huggingface.co/papers/2306.05685)
JUDGE_TEMPLATE = """\
Compare two answers to the last message of a conversation. Judge how correct, helpful and complete they are. Neither their \
order nor their length may count.

[Conversation]
{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}
[Answer A]
{{ answer_a }}

[Answer B]
{{ answer_b }}

Explain your judgement in a few sentences. Then end with the verdict alone: [[A]] if answer A is better, [[B]] if answer B is \
better, [[C]] for a tie."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_sampling(name: str, key: str, value: float) -> None:
    """Refuse a value of one of `SAMPLING_KEYS` that vLLM would refuse, under the `name` it has in the recipe."""
    allowed, meaning = {
        "temperature": (value >= 0, "at least 0; 0 is greedy"),
        "top_p": (0 < value <= 1, "in (0, 1]; 1 is off"),
        "top_k": (value >= -1, "at least 1, or 0: off"),
        "min_p": (0 <= value <= 1, "in [0, 1]; 0 is off"),
        "repetition_penalty": (value > 0, "positive; 1 is off"),
        "max_tokens": (value > 0, "positive"),
    }[key]
    _require(allowed, f"`{name}` must be {meaning}.")


def _check_stop(section: str, stop: str | list[str] | None, stop_token_ids: list[int] | None) -> list[str] | None:
    """The strings that end an answer, as a list; refuses what vLLM would refuse, or would never meet."""
    stop = [stop] if isinstance(stop, str) else stop
    _require("" not in (stop or []), f'`{section}.stop` has an empty text. Name what ends an answer, such as "\\n".')
    for text in stop or []:
        _require(
            not re.fullmatch(r"(\\[nrt])+", text),
            f"`{section}.stop` has a backslash and a letter, {text}, as YAML reads '{text}' in single quotes. Write \"{text}\", in double quotes.",
        )
    _require(min(stop_token_ids or [0]) >= 0, f"`{section}.stop_token_ids` must be at least 0.")
    return stop


def _check_server(url_key: str, env_key: str, url: str, api_key_env: str | None) -> None:
    """Refuse what is no address of a server, and secrets in it or in the place of their variable, without showing them."""
    _require(
        "@" not in url and "?" not in url,
        f"`{url_key}` holds a user, a password or a query, and it is written down. Give the server's address alone, and a key "
        f"through `{env_key}`.",
    )
    _require(
        url.startswith(("http://", "https://")),
        f"`{url_key}` must start with http:// or https://, got {url!r}; for example http://localhost:8000/v1.",
    )
    _require(
        api_key_env is None or re.fullmatch(r"[A-Za-z_]\w*", api_key_env, re.ASCII) is not None,
        f"`{env_key}` is no name of an environment variable, such as OPENAI_API_KEY. The key itself does not belong here.",
    )


@dataclass
class DatasetConfig:
    """
    One dataset of a mixture, with the keys of TRL's `DatasetConfig`.

    Parameters:
        path (`str`):
            A `.jsonl`, `.json`, `.parquet`, `.csv` or `.arrow` file, a directory of them, or a dataset id on the Hub.
        name (`str`, *optional*), data_dir (`str`, *optional*), data_files (`str`, `list[str]` or `dict[str, str]`, *optional*):
            As `datasets.load_dataset` takes them.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a directory or a Hub dataset.
        columns (`list[str]`, *optional*):
            The columns to keep. Default: all.
        fraction (`float`, *optional*):
            Share of the mixture: of each dataset the first rows, in these proportions, as many as there can be. For all
            datasets or for none. Default: all rows.
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | dict[str, str] | None = None
    split: str = "train"
    columns: list[str] | None = None
    fraction: float | None = None

    def __post_init__(self):
        _require(self.fraction is None or self.fraction > 0, "`fraction` must be positive.")


@dataclass
class _Source:
    """The keys that `prompts` and `evaluation` share: one dataset, or a mixture."""

    dataset: str | None = None
    datasets: list[DatasetConfig] | None = None
    split: str | None = None

    def entries(self) -> list[DatasetConfig]:
        """The datasets, one or several."""
        return self.datasets or [DatasetConfig(self.dataset, split=self.split)]

    def _check_source(self, section: str) -> None:
        _require(
            (self.dataset is None) != (not self.datasets),
            f"`{section}.dataset` is missing: a file, or a dataset id on the Hub. Or list several as `{section}.datasets`."
            if self.dataset is None
            else f"`{section}.dataset` and `{section}.datasets` are both given. Remove one.",
        )
        shares = [entry.fraction is not None for entry in self.datasets or []]
        _require(
            all(shares) or not any(shares), f"`{section}.datasets`: give a `fraction` to every dataset, or to none."
        )


@dataclass
class PromptsConfig(_Source):
    """
    Prompts to learn from. A row has `prompt` (text, or messages that end with the user's) and any columns that the
    scorer asks for.

    Parameters:
        dataset (`str`, *optional*):
            A `.jsonl`, `.json`, `.parquet`, `.csv` or `.arrow` file, a directory of them, or a dataset id on the Hub.
        datasets (`list[DatasetConfig]`, *optional*):
            In its place a mixture of several, as in TRL's `DatasetMixtureConfig`: each has a `path`, and may have `name`,
            `data_dir`, `data_files`, `split`, `columns` and `fraction`.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a directory or a Hub dataset.
        per_round (`int`, *optional*):
            Prompts of a round, all fresh. The paper uses 5,000 to 10,000. Default: the dataset divided by the rounds.
    """

    split: str = "train"
    per_round: int | None = None

    def __post_init__(self):
        self._check_source("prompts")
        _require(self.per_round is None or self.per_round > 0, "`prompts.per_round` must be positive.")


@dataclass
class GenerationConfig:
    """
    The engine that answers requests: vLLM in a child process, one start per round, vLLM servers, or workers of a Ray cluster.

    Parameters:
        engine (`str`, *optional*, defaults to `"vllm"`):
            `"vllm"` here, or `"ray"`: one in each of several workers of a Ray cluster.
        max_model_len (`int`, *optional*, defaults to `2048`):
            Longest sequence, prompt and answer together, in tokens.
        max_num_seqs (`int`, *optional*, defaults to `256`):
            Requests decoded together, and chains in progress.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Data type of the engine's weights. `"auto"` is vLLM's choice: the checkpoint's, but 16 bits for a float32 one.
        gpu_memory_utilization (`float`, *optional*, defaults to `0.9`):
            Share of the GPU's memory that vLLM may use. It is given back before training.
        cpu_kv_cache_gib (`int`, *optional*, defaults to `2`):
            Memory for the KV cache on a machine without a GPU, in GiB.
        tensor_parallel_size (`int`, *optional*, defaults to `1`):
            GPUs that share the model.
        quantization (`str`, *optional*):
            vLLM's quantization of the base model, such as `"fp8"` (CUDA only). `"bitsandbytes"`, the NF4 of training, needs a plugin
            of vLLM: vLLM 0.31 has none of its own.
        enforce_eager (`bool`, *optional*, defaults to `False`):
            Whether to skip compilation and CUDA graphs: a faster start, slower decoding. Always so on a CPU.
        answer_pattern (`str`, *optional*):
            A regular expression with one group: the part of a generated text that is its answer, which is refined, scored
            and learned, such as `(?s)</think>\\s*(.*)`. A text in which it is not found has no answer. Default: all of it.
            [house]
        ray_address (`str`, *optional*):
            With `engine: ray`, the cluster's address, such as `auto` on one of its machines. Default: a cluster of this machine alone,
            for the stage.
        ray_workers (`int`, *optional*, defaults to `1`):
            Its workers, each with `tensor_parallel_size` GPUs.
        base_urls (`list[str]`, *optional*):
            vLLM servers that answer in the place of an engine of the run's own, such as `[http://localhost:8000/v1]`. They must be
            able to load adapters, and see the run directory.
        api_key_env (`str`, *optional*):
            Environment variable that holds the servers' API key. The key itself is never written anywhere.
        max_concurrency_per_server (`int`, *optional*, defaults to `64`):
            Requests in flight on each server. [house]
        timeout (`float`, *optional*, defaults to `600.0`):
            Seconds until a request to a server counts as failed. [house]
        max_retries (`int`, *optional*, defaults to `5`):
            How often a request is sent again, to whichever server or worker of Ray there is, before it is set aside. A server that is
            only busy (status 429) is waited for, up to `max_outage`. [house]
        max_outage (`float`, *optional*, defaults to `600.0`):
            Seconds without any server, or worker of Ray, that can be used, after which the run stops. [house]
    """

    engine: Literal["vllm", "ray"] = "vllm"
    max_model_len: int = 2048
    max_num_seqs: int = 256
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    gpu_memory_utilization: float = 0.9
    cpu_kv_cache_gib: int = 2
    tensor_parallel_size: int = 1
    quantization: str | None = None
    enforce_eager: bool = False
    answer_pattern: str | None = None
    ray_address: str | None = None
    ray_workers: int = 1
    base_urls: list[str] | None = None
    api_key_env: str | None = None
    max_concurrency_per_server: int = 64
    timeout: float = 600.0
    max_retries: int = 5
    max_outage: float = 600.0

    def __post_init__(self):
        for name in (
            *("max_model_len", "max_num_seqs", "cpu_kv_cache_gib", "tensor_parallel_size"),
            *("max_concurrency_per_server", "timeout", "max_outage", "ray_workers"),
        ):
            _require(getattr(self, name) > 0, f"`generation.{name}` must be positive.")
        _require(self.max_retries >= 0, "`generation.max_retries` must be at least 0.")
        _require(
            self.engine == "ray" or (self.ray_address is None and self.ray_workers == 1),
            "`generation.ray_address` and `generation.ray_workers` are for `generation.engine: ray`. Set it, or remove them.",
        )
        if self.base_urls is not None:
            _require(
                self.engine == "vllm",
                "`generation.base_urls` and `generation.engine: ray` are both given. Remove one.",
            )
            _require(bool(self.base_urls), "`generation.base_urls` is empty. List servers, or leave the key out.")
            for url in self.base_urls:
                _check_server("generation.base_urls", "generation.api_key_env", url, self.api_key_env)
            twice = sorted({url for url in self.base_urls if self.base_urls.count(url) > 1})
            _require(not twice, f"`generation.base_urls` has {', '.join(twice)} twice. List each server once.")
        _require(0 < self.gpu_memory_utilization <= 1, "`generation.gpu_memory_utilization` must be in (0, 1].")
        if self.answer_pattern is not None:
            try:
                groups = re.compile(self.answer_pattern).groups
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(
                    f"`generation.answer_pattern` is not a regular expression of Python: {error}. In YAML, put it in "
                    "single quotes."
                ) from error
            _require(
                groups == 1,
                f"`generation.answer_pattern` has {groups} groups. Put ( ) around the answer, and write (?: ) for any "
                "other group.",
            )


@dataclass
class DraftsConfig:
    """
    Sampling of the first answers, y1. All parameters are passed to vLLM explicitly: a model's own
    `generation_config.json` does not change them.

    Parameters:
        temperature (`float`, *optional*, defaults to `0.7`):
            Sampling temperature. [house] The paper's relatives sample at 0.7.
        top_p (`float`, *optional*, defaults to `1.0`), top_k (`int`, *optional*, defaults to `0`):
            Nucleus and top-k sampling; `1.0` and `0` are off. [house]
        min_p (`float`, *optional*, defaults to `0.0`):
            Least probability of a token, as a share of the likeliest one's; `0.0` is off. [house]
        repetition_penalty (`float`, *optional*, defaults to `1.0`):
            By how much tokens of the prompt and of the answer so far become less likely; `1.0` is off. [house]
        max_tokens (`int`, *optional*, defaults to `512`):
            Longest answer, in tokens. [house]
        stop (`str` or `list[str]`, *optional*):
            Texts that end an answer and are not part of it, such as `["\\n"]` for a base model, which has learned no end of
            its own.
        stop_token_ids (`list[int]`, *optional*):
            Tokens that end an answer, beside the model's own EOS tokens.
    """

    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 512
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None

    def __post_init__(self):
        for key in SAMPLING_KEYS:
            _check_sampling(f"drafts.{key}", key, getattr(self, key))
        self.stop = _check_stop("drafts", self.stop, self.stop_token_ids)


@dataclass
class RefinementsConfig:
    """
    How the answers after the draft are asked for: the paper's four strategies.

    Parameters:
        strategy (`str`, *optional*, defaults to `"chain"`):
            `"chain"` (`y_{k+1} ~ π(·|x, y_k, z)`, with only the last answer in context; the paper's best), `"parallel"`
            (more samples of the prompt itself), `"few_shot"` (all earlier answers in context) or `"self_evaluation"` (the
            policy judges its last answer, and refines it given the critique).
        turns (`int`, *optional*, defaults to `4`):
            Answers of a chain, the draft included: the paper's y1..y4.
        template (`str` or `list[str]`, *optional*):
            The refinement template z, in Jinja2, with `question`, `draft`, `drafts`, `critique` and `turn`; or one for
            each refinement, of which training rows have the first. Default: ours for the strategy, [house].
        evaluation_template (`str`, *optional*):
            For `"self_evaluation"`: the template that asks for the critique. Default: ours, [house].
        temperature (`float` or `list[float]`, *optional*), top_p (`float` or `list[float]`, *optional*):
            Sampling of the refinements, one value for all or one for each. Default: the drafts'. A critique is sampled as
            the refinement it is for. [house]
        top_k (`int` or `list[int]`, *optional*), max_tokens (`int` or `list[int]`, *optional*):
            Likewise: one value for all refinements or one for each. Default: the drafts'. [house]
        min_p (`float` or `list[float]`, *optional*), repetition_penalty (`float` or `list[float]`, *optional*):
            Likewise. [house]
        stop (`str` or `list[str]`, *optional*), stop_token_ids (`list[int]`, *optional*):
            What ends a refinement; `[]` is nothing but the model's own EOS tokens. Default: the drafts'.
    """

    strategy: Literal["chain", "parallel", "few_shot", "self_evaluation"] = "chain"
    turns: int = 4
    template: str | list[str] | None = None
    evaluation_template: str | None = None
    temperature: float | list[float] | None = None
    top_p: float | list[float] | None = None
    top_k: int | list[int] | None = None
    min_p: float | list[float] | None = None
    repetition_penalty: float | list[float] | None = None
    max_tokens: int | list[int] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None

    def __post_init__(self):
        _require(self.turns >= 2, "`refinements.turns` must be at least 2: a draft and one refinement.")
        for key in ("template", *SAMPLING_KEYS):
            values = _listed(f"refinements.{key}", getattr(self, key))
            _require(
                not isinstance(getattr(self, key), list) or len(values) == self.turns - 1,
                f"`refinements.{key}` is a list of {len(values)}, and a chain of {self.turns} turns has {self.turns - 1} "
                "refinements. Give one value for all of them, or one for each.",
            )
        if self.template is None:
            self.template = TEMPLATES[self.strategy]
        for name, template in _listed("refinements.template", self.template):
            check_refinement_template(name, template, self.strategy)
        _require(
            self.evaluation_template is None or self.strategy == "self_evaluation",
            f"`refinements.evaluation_template` asks for a critique, and `refinements.strategy: {self.strategy}` has none. "
            "Remove it, or set `refinements.strategy: self_evaluation`.",
        )
        if self.strategy == "self_evaluation":
            if self.evaluation_template is None:
                self.evaluation_template = EVALUATION_TEMPLATE
            check_evaluation_template("refinements.evaluation_template", self.evaluation_template)
        for key in SAMPLING_KEYS:
            for name, value in _listed(f"refinements.{key}", getattr(self, key)):
                _check_sampling(name, key, value)
        self.stop = _check_stop("refinements", self.stop, self.stop_token_ids)


def _listed(name: str, values: Any) -> list[tuple[str, Any]]:
    """The values of a key that takes one or a list, each with its name in the recipe."""
    if isinstance(values, list):
        return [(f"{name}[{index}]", value) for index, value in enumerate(values)]
    return [] if values is None else [(name, values)]


@dataclass
class JudgeConfig:
    """
    A language model behind an OpenAI-compatible server that compares answers two at a time.

    Parameters:
        base_url (`str`):
            The server's URL up to and including its version, such as `http://localhost:8000/v1`.
        model (`str`):
            The model's name there.
        api_key_env (`str`, *optional*):
            Environment variable that holds the API key. The key itself is never written anywhere.
        template (`str`, *optional*):
            What the judge is asked, in Jinja2, with `messages` (the conversation; plain text is one user message),
            `question` (its last message), `answer_a`, `answer_b` and the prompt's other columns. The last `[[A]]`, `[[B]]`
            or `[[C]]` (a tie) of the reply is its verdict. Default: ours, [house].
        temperature (`float`, *optional*, defaults to `0.0`), max_tokens (`int`, *optional*, defaults to `1024`):
            Sampling of the reply. `null` leaves them to the server, as some reasoning models require. [house]
        max_concurrency (`int`, *optional*, defaults to `8`):
            Requests in flight.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds until a request counts as failed.
        max_retries (`int`, *optional*, defaults to `5`):
            How often a failed request is repeated, after 0.5, 1, 2, ... seconds.
    """

    base_url: str
    model: str
    api_key_env: str | None = None
    template: str = JUDGE_TEMPLATE
    temperature: float | None = 0.0
    max_tokens: int | None = 1024
    max_concurrency: int = 8
    timeout: float = 120.0
    max_retries: int = 5

    def __post_init__(self):
        _check_server("judge.base_url", "judge.api_key_env", self.base_url, self.api_key_env)
        _require(self.temperature is None or self.temperature >= 0, "`judge.temperature` must be at least 0.")
        _require(self.max_tokens is None or self.max_tokens > 0, "`judge.max_tokens` must be positive, or null.")
        _require(self.max_concurrency > 0, "`judge.max_concurrency` must be positive.")
        _require(self.timeout > 0, "`judge.timeout` must be positive.")
        _require(self.max_retries >= 0, "`judge.max_retries` must be at least 0.")
        try:
            variables = find_undeclared_variables(Environment().parse(self.template))
            Environment().from_string(self.template)  # an unknown filter shows here
        except Exception as error:  # the user's code: besides its own errors Jinja2 has those of Python's compiler
            raise ValueError(f"`judge.template` is not valid Jinja2: {error}.") from error
        missing = [name for name in ("answer_a", "answer_b") if name not in variables]
        _require(
            not missing,
            f"`judge.template` never mentions {' and '.join(f'`{name}`' for name in missing)}. Write {{{{ answer_a }}}} and "
            "{{ answer_b }} where the answers go.",
        )


@dataclass
class _OneScorer:
    """The keys that `scores` and an entry of `scores.scorers` share."""

    verifier: str | None = None
    reward_model: str | None = None
    reward_model_revision: str | None = None
    reward_model_backend: Literal["auto", "vllm", "transformers"] = "auto"
    batch_size: int = 16
    judge: JudgeConfig | None = None
    timeout: float | None = None

    def kinds(self) -> list[str]:
        """Which of the three kinds of scorers are named."""
        return [kind for kind in ("verifier", "reward_model", "judge") if getattr(self, kind) is not None]

    def __post_init__(self):
        _require(
            len(self.kinds()) <= 1,
            f"{' and '.join(f'`{kind}`' for kind in self.kinds())} are given together. Name one of them, or list them under "
            "`scores.scorers`, each with a `weight`.",
        )
        _require(self.batch_size > 0, "`batch_size` must be positive.")
        _require(self.timeout is None or self.timeout > 0, "`timeout` must be positive, in seconds, or null for none.")
        _require(
            self.timeout is None or self.verifier is not None,
            "`timeout` is for a `verifier`, beside which it stands. A judge has its own, `judge.timeout`.",
        )


@dataclass
class ScorerConfig(_OneScorer):
    """
    One of several scorers: the keys of [`ScoresConfig`] that name it, and its part in the sum.

    Parameters:
        name (`str`, *optional*):
            What its scores are called in `scores.jsonl`. Default: `verifier`, `reward_model` or `judge`.
        weight (`float`, *optional*, defaults to `1.0`):
            Its weight in the sum.
    """

    name: str | None = None
    weight: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        _require(
            bool(self.kinds()), "a scorer names a `verifier`, a `reward_model` or a `judge`; this one names none."
        )
        _require(math.isfinite(self.weight) and self.weight != 0, "`weight` must be a finite number other than 0.")
        self.name = self.name or self.kinds()[0]
        _require(
            bool(re.fullmatch(r"[\w.-]+", self.name)),
            f"`name` names files: letters, digits, `_.-`; got {self.name!r}.",
        )


@dataclass
class ScoresConfig(_OneScorer):
    """
    Who scores the answers: a verifier, a reward model, a judge, several of them, or nobody where the pairs are rule-based
    (then the evaluation has no scores either, only lengths).

    Parameters:
        verifier (`str`, *optional*):
            `path/to/file.py:function` with TRL's reward-function signature,
            `(prompts, completions, **columns) -> list[float | None]`. Imported from that file only. Or `trl.rewards:name`.
        reward_model (`str`, *optional*):
            A sequence-classification model with one output, as a path or Hub id. Its score is that output as it is,
            without a sigmoid.
        reward_model_revision (`str`, *optional*):
            Its branch, tag or commit on the Hub.
        reward_model_backend (`str`, *optional*, defaults to `"auto"`):
            `"vllm"`, `"transformers"`, or `"auto"`: vLLM unless it does not know the architecture or is not installed.
        batch_size (`int`, *optional*, defaults to `16`):
            Answers per forward of the reward model under transformers. vLLM batches by itself.
        judge ([`JudgeConfig`], *optional*):
            A language model behind a server; the score of an answer is its win rate against the others of its chain.
            [house]
        timeout (`float`, *optional*):
            Seconds for one call of the verifier, with the answers of up to 100 chains. Default: as long as it takes.
        scorers (`list[ScorerConfig]`, *optional*):
            Several of these, in place of the keys above. The score is their weighted sum; an answer that one of them leaves
            without a score has none. [house]
    """

    scorers: list[ScorerConfig] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.scorers is None:
            return
        _require(
            not self.kinds(),
            f"`scores` has both `scorers` and a `{(self.kinds() or [''])[0]}`. Move it into the list, or drop the list.",
        )
        _require(bool(self.scorers), "`scores.scorers` is empty. List scorers, or leave the key out.")
        names = [scorer.name for scorer in self.scorers]
        twice = sorted({name for name in names if names.count(name) > 1})
        _require(not twice, f"`scores.scorers` has two called {', '.join(twice)}. Give each a `name` of its own.")

    def each(self) -> list[ScorerConfig]:
        """The scorers, in either form; none where the pairs are rule-based."""
        if self.scorers is not None:
            return self.scorers
        keys = {field.name: getattr(self, field.name) for field in fields(_OneScorer)}
        return [ScorerConfig(**keys)] if self.kinds() else []


@dataclass
class PairsConfig:
    """
    How chains become preference pairs.

    Parameters:
        selection (`str`, *optional*, defaults to `"best_over_worst"`):
            `"best_over_worst"` (the paper's reward-model scoring: highest score chosen, lowest rejected) or
            `"rule_based"` (no scores: the last refinement chosen, the draft rejected, where the chain has settled;
            the rule is [house]).
        min_margin (`float`, *optional*, defaults to `0.0`):
            The chosen score must exceed the rejected one by more than this. [house]
        min_chosen_score, max_rejected_score (`float`, *optional*):
            Bounds on the scores; with a 0/1 verifier, a margin above 0 already means right over wrong. [house]
        pairs_per_prompt (`int`, *optional*, defaults to `1`):
            For `"best_over_worst"`: pairs of a chain, the best answer over the worst, then the next best over the next
            worst, no text twice. [house]
        max_length_ratio (`float`, *optional*):
            The chosen answer may have at most this many times the tokens of the rejected one. Much shorter ones stay.
            [house]
        settled_similarity (`float`, *optional*, defaults to `0.9`):
            For `"rule_based"`: the last two answers must be at least this similar (difflib's ratio of their words).
            [house]
        direct_weight, refinement_weight (`int`, *optional*, defaults to `1`):
            How often an epoch shows a pair's direct row, and each of its two refinement rows (from the rejected and
            from the chosen draft). `0` leaves them out. [house]
        learn (`str`, *optional*, defaults to `"answer"`):
            With `generation.answer_pattern`, what a training row holds: `"answer"`, or `"full_text"`, all that was generated, a thinking
            model's thought included. What is refined and scored is the answer in either case. [house]
        guard (`str`, *optional*, defaults to `"stop"`):
            What happens to a round whose chosen answers do not score higher than its rejected ones on average: `"stop"`
            ends the run before training, `"skip"` leaves the round untrained and goes on to the next one, `"warn"`
            trains on it all the same. It cannot judge a `"best_over_worst"` round, which is selected by the same scores and
            passes by construction. [house]
    """

    selection: Literal["best_over_worst", "rule_based"] = "best_over_worst"
    min_margin: float = 0.0
    min_chosen_score: float | None = None
    max_rejected_score: float | None = None
    pairs_per_prompt: int = 1
    max_length_ratio: float | None = None
    settled_similarity: float = 0.9
    direct_weight: int = 1
    refinement_weight: int = 1
    learn: Literal["answer", "full_text"] = "answer"
    guard: Literal["stop", "skip", "warn"] = "stop"

    def __post_init__(self):
        _require(self.min_margin >= 0, "`pairs.min_margin` must be at least 0.")
        _require(self.pairs_per_prompt > 0, "`pairs.pairs_per_prompt` must be positive.")
        _require(
            self.pairs_per_prompt == 1 or self.selection == "best_over_worst",
            "`pairs.pairs_per_prompt` above 1 ranks the answers by score: it needs `pairs.selection: best_over_worst`. The "
            "rule has one pair per chain.",
        )
        _require(
            self.max_length_ratio is None or self.max_length_ratio >= 1,
            "`pairs.max_length_ratio` must be at least 1: at 1 the chosen answer may be as long as the rejected one.",
        )
        _require(0 <= self.settled_similarity <= 1, "`pairs.settled_similarity` must be in [0, 1].")
        _require(
            min(self.direct_weight, self.refinement_weight) >= 0 and self.direct_weight + self.refinement_weight > 0,
            "`pairs.direct_weight` and `pairs.refinement_weight` must be at least 0, and one of them positive.",
        )


@dataclass
class EvaluationConfig(_Source):
    """
    Prompts that nothing is learned from, answered by every round's policy, greedily, with the same chain of refinements.

    Parameters:
        dataset (`str`, *optional*), datasets (`list[DatasetConfig]`, *optional*), split (`str`, *optional*, defaults to `"test"`):
            As in `prompts`.
        samples (`int`, *optional*):
            Use only the first ones.
        temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature; `0` is greedy.
        correct_score (`float`, *optional*):
            Score from which an answer counts as right, for the flips between turns. Default: 1 where all scores are 0 or
            1, otherwise no answer is right or wrong.
        bootstrap_samples (`int`, *optional*, defaults to `10000`):
            Resamples of the 95 % bootstrap intervals over prompts, which mean scores have; those of shares need none. [house]
    """

    split: str = "test"
    samples: int | None = None
    temperature: float = 0.0
    correct_score: float | None = None
    bootstrap_samples: int = 10_000

    def __post_init__(self):
        self._check_source("evaluation")
        _require(self.samples is None or self.samples > 0, "`evaluation.samples` must be positive.")
        _require(self.temperature >= 0, "`evaluation.temperature` must be at least 0; 0 is greedy.")
        _require(self.bootstrap_samples > 0, "`evaluation.bootstrap_samples` must be positive.")


@dataclass
class ParityConfig:
    """
    A check, before a round uses its answers, that they come from the policy: the engine's log-probabilities of answers that it
    samples are compared with the trainer's side. The same answers give the KL to the initial policy.

    Parameters:
        samples (`int`, *optional*, defaults to `64`):
            Answers to evaluation prompts, at temperature 1, in every start of the engine. `0` is no check and no KL. [house]
        tolerance (`float`, *optional*):
            Largest difference in nats per token, as the root mean square. Default: by the engine's data type, 0.01 for
            float32 and 0.2 for 16 bits. [house]
    """

    samples: int = 64
    tolerance: float | None = None

    def __post_init__(self):
        _require(self.samples >= 0, "`parity.samples` must be at least 0; 0 is no check.")
        _require(self.tolerance is None or self.tolerance > 0, "`parity.tolerance` must be positive.")


@dataclass
class HealthConfig:
    """
    When a run stops rather than go on with what is left of its data or of its policy. `null` switches a bound off. The bounds on the policy
    see a collapse, and not that its answers get worse otherwise: that is what a round says when it is closed.

    Parameters:
        max_dropped (`float`, *optional*, defaults to `0.5`):
            Largest share of rows that cannot be used: SFT rows without an answer, prompts that are too long, chains without two
            whole, scored answers, training rows whose prompt fills `max_length`. What a rule of `pairs` leaves out does not count.
            Generation is looked at from its first 64 chains on. [house]
        max_kl (`float`, *optional*, defaults to `0.4`):
            Largest KL of a round's policy to the initial policy, in nats per token. Measured if `parity.samples` is not 0. From
            `docs/evidence/aries.md`: rounds in which the policy collapsed have 0.41 to 0.96, all others at most 0.26. It does
            not see a policy that gets worse close to where it began. [house]
        min_length (`float`, *optional*, defaults to `0.1`):
            Least mean length of the direct evaluation answers, as a ratio to round 0's. [house]
        min_diversity (`float`, *optional*, defaults to `0.1`):
            Least `distinct_2` of the direct evaluation answers, as a ratio to round 0's. [house]
    """

    max_dropped: float | None = 0.5
    max_kl: float | None = 0.4
    min_length: float | None = 0.1
    min_diversity: float | None = 0.1

    def __post_init__(self):
        _require(
            self.max_dropped is None or 0 <= self.max_dropped < 1,
            "`health.max_dropped` must be in [0, 1), or null for no bound.",
        )
        _require(self.max_kl is None or self.max_kl > 0, "`health.max_kl` must be positive, or null for no bound.")
        for key in ("min_length", "min_diversity"):
            _require(
                getattr(self, key) is None or 0 < getattr(self, key) <= 1,
                f"`health.{key}` must be in (0, 1], or null for no bound.",
            )


@dataclass
class AriesConfig:
    """
    An ARIES run (https://huggingface.co/papers/2502.05605): rounds of prompts -> drafts -> refinements -> scores -> pairs
    -> training.

    Parameters:
        output_dir (`str`):
            The run directory: one that is empty or not there yet, outside of what the recipe reads. Running the same recipe again
            continues it.
        model (`dict`):
            Keys of TRL's `ModelConfig`: `model_name_or_path`, `dtype`, `use_peft`, `lora_r`, `load_in_4bit`...
        prompts, generation, drafts, refinements, scores, pairs, evaluation, parity, health:
            The sections above.
        sft (`dict`, *optional*):
            SFT before round 1: `dataset` (rows with `prompt`, `completion` and optionally `draft`, which makes the row
            a refinement target) and keys of TRL's `SFTConfig`.
        training (`dict`):
            `trainer` (`"dpo"`, `"tdpo"` or `"self_refine_dpo"`), `reference` (`"previous"`, the default and [house], or
            `"initial"`: the policy before round 1), `objective` (`"logistic"`, the default: every row takes the trainer's
            loss; or `"squared"`, the paper's: `(1 − α) L_direct + α L_refine` with the squared loss on refinement rows),
            `objective_alpha` (its α, by default 0.8, [house]), `accelerate_config` (a file, or a name such as `ddp` or
            `fsdp2`, with which this training and the SFT are launched; default: one process), `num_processes` (its processes,
            one for each GPU; default: as many as that file says), and keys of that trainer's config.
        rounds (`int`, *optional*, defaults to `3`):
            Rounds after the SFT; the paper runs about three.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the prompt order, of every sampled answer and of training (unless the section sets its own).
    """

    output_dir: str
    model: dict[str, Any]
    prompts: PromptsConfig
    evaluation: EvaluationConfig
    training: dict[str, Any]
    sft: dict[str, Any] | None = None
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    drafts: DraftsConfig = field(default_factory=DraftsConfig)
    refinements: RefinementsConfig = field(default_factory=RefinementsConfig)
    scores: ScoresConfig = field(default_factory=ScoresConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    parity: ParityConfig = field(default_factory=ParityConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    rounds: int = 3
    seed: int = 42

    @property
    def trust_remote_code(self) -> bool:
        return bool(self.training.get("trust_remote_code", False))

    @property
    def trained_on_nf4_sampled_at_full_precision(self) -> bool:
        return bool(self.model.get("load_in_4bit")) and self.generation.quantization is None

    def __post_init__(self):
        _require(
            bool(self.output_dir.strip()), "`output_dir` is empty. Name a directory for the run, such as runs/my-run."
        )
        self.output_dir = os.path.expanduser(self.output_dir)
        _require(self.rounds > 0, "`rounds` must be positive.")
        _require(
            0 <= self.seed < 2**32 - self.rounds,
            "`seed` must be at least 0 and below 2^32: every round adds its number.",
        )
        _require(
            self.model.get("lora_r", 16) <= MAX_LORA_RANK, f"`model.lora_r`: vLLM serves ranks up to {MAX_LORA_RANK}."
        )
        _require(
            "model_name_or_path" in self.model, "`model.model_name_or_path` is missing: a path, or an id on the Hub."
        )
        _require(
            self.generation.base_urls is None or bool(self.model.get("use_peft")),
            "`generation.base_urls`: servers keep the weights they were started with, and full fine-tuning makes new ones in every round. "
            "Train an adapter, `model.use_peft: true`, or leave `base_urls` out.",
        )
        _require(
            self.sft is None or "dataset" in self.sft, "`sft.dataset` is missing: rows with `prompt`, `completion`."
        )
        for key, choices in {
            "trainer": ("dpo", "tdpo", "self_refine_dpo"),
            "reference": ("previous", "initial"),
            "objective": ("logistic", "squared"),
        }.items():
            value = self.training.get(key, choices[0])
            _require(value in choices, f"`training.{key}` must be one of {', '.join(choices)}; got {value!r}.")
        self._check_launch()
        self._check_objective()
        _require(
            self.pairs.selection == "rule_based" or bool(self.scores.each()),
            "`scores` names neither a `verifier` nor a `reward_model` nor a `judge`, and best-over-worst pairs need one. Set "
            "`scores.verifier: path/to/file.py:function`, `scores.reward_model`, `scores.judge` or `scores.scorers`, or "
            "`pairs.selection: rule_based`.",
        )
        _require(
            self.pairs.selection != "rule_based" or self.refinements.strategy != "parallel",
            "`pairs.selection: rule_based` takes the last answer over the first, and with `refinements.strategy: parallel` "
            "they are samples of one prompt. Set `pairs.selection: best_over_worst`, or another strategy.",
        )
        _require(
            self.pairs.learn == "answer" or self.generation.answer_pattern is not None,
            "`pairs.learn: full_text` needs `generation.answer_pattern`, such as '(?s)</think>\\s*(.*)': without it, the answer is the full text.",
        )
        for name, max_tokens in (
            ("drafts.max_tokens", self.drafts.max_tokens),
            *_listed("refinements.max_tokens", self.refinements.max_tokens),
        ):
            _require(
                max_tokens < self.generation.max_model_len,
                f"`{name}` ({max_tokens}) leaves no room for a prompt in "
                f"`generation.max_model_len` ({self.generation.max_model_len}).",
            )

    def _check_launch(self) -> None:
        name, count = (self.training.get(key) for key in ("accelerate_config", "num_processes"))
        _require(
            isinstance(name, str | None),
            f"`training.accelerate_config` must be a file, or a name such as ddp or fsdp2, got {name!r}.",
        )
        _require(
            count is None or (type(count) is int and count > 0),
            f"`training.num_processes` must be a positive whole number, got {count!r}.",
        )
        _require(
            count is None or name is not None,
            "`training.num_processes` belongs to `training.accelerate_config`. Set that too, for example to ddp.",
        )

    def _check_objective(self) -> None:
        alpha = objective_alpha(self)
        if alpha is None:
            _require(
                "objective_alpha" not in self.training,
                "`training.objective_alpha` belongs to `training.objective: squared`. The balance of the logistic objective is "
                "set by `pairs.direct_weight` and `pairs.refinement_weight`.",
            )
            return
        _require(
            type(alpha) in (int, float) and 0 < alpha <= 1,
            f"`training.objective_alpha` must be a number in (0, 1], got {alpha!r}.",
        )
        _require(
            self.pairs.refinement_weight > 0,
            "`training.objective: squared` is a loss of refinement rows, and `pairs.refinement_weight: 0` leaves them out.",
        )
        _require(
            self.pairs.direct_weight > 0 or alpha == 1,
            "`pairs.direct_weight: 0` leaves out the rows of L_direct, whose weight is 1 − `training.objective_alpha`. Set that "
            "to 1.0, or keep the rows.",
        )


def sampling_by_turn(config: AriesConfig) -> list[DraftsConfig]:
    """
    Sampling of the answers y1, y2, ...: the drafts', where `refinements` says nothing else.
    """
    sampling = [config.drafts]
    for index in range(config.refinements.turns - 1):
        values = {key: getattr(config.refinements, key) for key in SAMPLING_KEYS}
        own = {key: value[index] if isinstance(value, list) else value for key, value in values.items()}
        own |= {key: getattr(config.refinements, key) for key in STOP_KEYS}
        sampling.append(replace(config.drafts, **{key: value for key, value in own.items() if value is not None}))
    return sampling


def objective_alpha(config: AriesConfig) -> float | None:
    """α of `(1 − α) L_direct + α L_refine` for the squared objective, `None` for the logistic one."""
    if config.training.get("objective", "logistic") == "logistic":
        return None
    return config.training.get("objective_alpha", OBJECTIVE_ALPHA)
