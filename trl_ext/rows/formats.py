"""
Reads the shapes in which preference data is published as TRL's: `prompt`, `chosen` and `rejected`, text or messages.

In: one row, and what its columns contain ([`Columns`]). Out: the row in TRL's form, and the names of its conversions. A shape with only
one meaning is converted; any other is refused by name, with the line of `datasets` code that converts it. Deliberately not here: the
tokenizer, and whether a row can be used for training (`judge.py`).
"""

import ast
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..recipe_values import RecipeError


Messages = list[dict[str, Any]]
Text = str | Messages | None

# Other names of TRL's roles
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "observation": "tool",
}
STANDARD_ROLES = ("system", "developer", "user", "assistant", "tool")

# Other names of TRL's columns
PROMPTS = ("question", "instruction", "query", "messages", "conversations")
ANSWERS = {"chosen": ("chosen_response", "response_j"), "rejected": ("rejected_response", "response_k")}
SYSTEM = ("system", "system_prompt")

# Columns of formats that have no pairs, or pairs without an order -> name of the format, how to fix it
REFUSED = {
    ("completion", "label"): (
        "KTO's unpaired answers",
        "A pair needs two answers to one prompt. Use `trl.KTOTrainer`, or pair the answers of each prompt.",
    ),
    ("instruction", "completions"): (
        "UltraFeedback's answers with ratings",
        "Rank them: `dataset.map(lambda row: (lambda a: {'prompt': row['instruction'], 'chosen': a[-1]['response'], 'rejected': "
        "a[0]['response']})(sorted(row['completions'], key=lambda a: a['overall_score'])))`, or use "
        "HuggingFaceH4/ultrafeedback_binarized.",
    ),
    ("prompt", "answers"): (
        "ranked answers (Nectar)",
        "Choose two: `dataset.map(lambda row: (lambda a: {'chosen': a[0]['answer'], 'rejected': a[-1]['answer']})(sorted("
        "row['answers'], key=lambda a: a['rank'])))`.",
    ),
    ("response_0", "response_1"): (
        "two answers and a label (PKU-SafeRLHF)",
        "Choose a label: `dataset.map(lambda row: {'chosen': row[f\"response_{row['better_response_id']}\"], 'rejected': "
        "row[f\"response_{1 - row['better_response_id']}\"]})`.",
    ),
    ("response1", "response2"): (
        "two answers and a score (HelpSteer3)",
        "Apply the label: `dataset.filter(lambda row: row['overall_preference'] != 0).map(lambda row: {'prompt': row['context'], "
        "'chosen': [{'role': 'assistant', 'content': row['response1' if row['overall_preference'] < 0 else 'response2']}], "
        "'rejected': [{'role': 'assistant', 'content': row['response2' if row['overall_preference'] < 0 else 'response1']}]})`.",
    ),
    ("response_a", "response_b"): (
        "two answers and a winner",
        "Apply the label: `dataset.map(lambda row: {'chosen': row['response_a' if row['winner'] == 'model_a' else 'response_b'], "
        "'rejected': row['response_b' if row['winner'] == 'model_a' else 'response_a']})`, ties left out.",
    ),
    ("conversation_a", "conversation_b"): (
        "two conversations and a winner (Chatbot Arena)",
        "Apply the label: `dataset.filter(lambda row: row['winner'] in ('model_a', 'model_b')).map(lambda row: {'chosen': "
        "row['conversation_' + row['winner'][-1]], 'rejected': row['conversation_' + 'ba'['ab'.index(row['winner'][-1])]]})`.",
    ),
    ("output_1", "output_2"): (
        "two answers and a preference (AlpacaFarm)",
        "Apply the label: `dataset.map(lambda row: {'chosen': row[f\"output_{row['preference']}\"], 'rejected': "
        "row[f\"output_{3 - row['preference']}\"]})`.",
    ),
    ("human_ref_A", "human_ref_B"): (
        "two answers and a label (SHP)",
        "`dataset.map(lambda row: {'prompt': row['history'], 'chosen': row['human_ref_A' if row['labels'] else 'human_ref_B'], "
        "'rejected': row['human_ref_B' if row['labels'] else 'human_ref_A']})`.",
    ),
    ("prompt", "completion"): (
        "prompts with one answer",
        "Preference training needs two answers to each prompt. Use `trl.SFTTrainer` for one.",
    ),
    ("messages",): (
        "conversations to imitate",
        "Preference training needs two answers to each prompt. Use `trl.SFTTrainer` for one.",
    ),
    ("conversations",): (
        "conversations to imitate (ShareGPT)",
        "Preference training needs two answers to each prompt. Use `trl.SFTTrainer` for one.",
    ),
}


# Columns -> name of the format; the first that fits is reported
NAMES = {
    ("question", "response_j", "response_k"): "StackExchange's pairs",
    ("chosen_response", "rejected_response"): "Argilla's columns",
    ("messages", "prompt", "chosen", "rejected", "score_chosen"): "UltraFeedback, binarized",
    ("messages", "chosen", "rejected"): "axolotl's `chat_template`",
    ("conversations", "chosen", "rejected"): "LLaMA-Factory's ShareGPT",
    ("instruction", "input", "chosen", "rejected"): "LLaMA-Factory's Alpaca",
    ("system", "question", "chosen", "rejected"): "Orca's columns",
}


@dataclass(frozen=True)
class Columns:
    """
    The names of the columns, `None` for a missing one.

    Args:
        chosen, rejected (`str`), prompt, system (`str`, *optional*):
            Columns of the answers, the prompt and a system message.
        input, history (`str`, *optional*):
            LLaMA-Factory's columns: text after the instruction, and earlier turns in pairs.
        format (`str`, *optional*):
            Name of the format.
    """

    chosen: str
    rejected: str
    prompt: str | None
    system: str | None = None
    input: str | None = None
    history: str | None = None
    format: str | None = None

    @classmethod
    def of(cls, names: list[str]) -> "Columns":
        """
        Find the columns by name.

        Raises:
            [`RecipeError`]: the columns are those of another kind of data, which is named, or unknown.
        """
        answers = {}
        for ours, others in ANSWERS.items():
            answers[ours] = next((name for name in (ours, *others) if name in names), None)
        if None in answers.values():
            for columns, (what, fix) in REFUSED.items():
                if set(columns) <= set(names):
                    shown = " and ".join(f"`{name}`" for name in columns)
                    raise RecipeError(f"{shown} are the columns of {what}, not of preference pairs. {fix}")
            missing = [ours for ours, found in answers.items() if found is None]
            raise RecipeError(
                f"no column {' and '.join(f'`{name}`' for name in missing)}; found {', '.join(f'`{name}`' for name in names)}. A "
                "preference dataset has `chosen` and `rejected`, and usually `prompt`: `dataset.rename_column('better', 'chosen')`."
            )
        prompt, system = (
            next((name for name in known if name in names), None) for known in (("prompt", *PROMPTS), SYSTEM)
        )
        of_instruction = prompt == "instruction"
        return cls(
            **answers,
            prompt=prompt,
            system=system,
            input="input" if of_instruction and "input" in names else None,
            history="history" if of_instruction and "history" in names else None,
            format=next((name for columns, name in NAMES.items() if set(columns) <= set(names)), None),
        )

    @property
    def read(self) -> list[str]:
        """Names of the columns that are read."""
        names = (self.prompt, self.chosen, self.rejected, self.system, self.input, self.history)
        return [name for name in names if name is not None]


@dataclass
class Pair:
    """
    A row in TRL's form.

    Args:
        prompt, chosen, rejected (`str`, `list[dict]` or `None`):
            Text, messages, or `None`.
        done (`list[str]`):
            Names of its conversions, keys of [`CONVERSIONS`].
        fault (`str`, *optional*):
            Why it cannot be used: a key of `judge.REASONS`.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    done: list[str] = field(default_factory=list)
    fault: str | None = None

    @property
    def is_conversational(self) -> bool:
        return isinstance(self.chosen, list) or isinstance(self.rejected, list) or isinstance(self.prompt, list)


# Conversion -> its description, followed by the number of rows
CONVERSIONS = {
    "json": "messages written as JSON in text are read as messages",
    "sharegpt": "ShareGPT's turns (`from`, `value`) are read as messages",
    "role": "roles such as `human` and `gpt` are read as `user` and `assistant`",
    "parts": "text parts of `content` are read as text",
    "message": "a single message is read as a list of one",
    "list": "a list of one text is read as text",
    "column": "other names of the columns are read as `prompt`, `chosen` and `rejected`",
    "input": "`instruction` and `input` are read as one prompt",
    "history": "`history` is read as earlier turns",
    "system": "the column `system` is read as the system message",
    "question": "a text prompt beside answers that are messages is read as the user's message",
    "answer": "answers that are text beside a prompt of messages are read as the assistant's",
    "beginning": "a text prompt that the conversations repeat is left out",
    "repeated": "a prompt that both answers repeat is removed from them",
    "opening": "common messages before the first answer are read as part of the prompt",
    "dialogue": "dialogues of `Human:` and `Assistant:` (HH-RLHF) are split before their last answer",
    "nulls": "keys that are null because other rows have them are left out, as are empty `tools` and `chat_template_kwargs`",
}


def read_pair(row: dict[str, Any], columns: Columns, as_messages: bool = False, cut_prompt: bool = False) -> Pair:
    """
    Read one row.

    Args:
        row (`dict`):
            The row.
        columns ([`Columns`]):
            The names of its columns.
        as_messages (`bool`, *optional*, defaults to `False`):
            Whether to read text as messages, for a dataset in which other rows are messages.
        cut_prompt (`bool`, *optional*, defaults to `False`):
            Whether to remove a text prompt from answers that begin with it, for a dataset in which most do.
    """
    done: list[str] = []
    chosen, rejected = (read_text(row.get(name), done) for name in (columns.chosen, columns.rejected))
    prompt = None if columns.prompt is None else read_text(row.get(columns.prompt), done)
    fault = next(filter(None, map(form_fault, (prompt, chosen, rejected))), None)
    if fault is not None:
        return Pair(prompt, chosen, rejected, fault=fault)
    whole = all(isinstance(answer, list) and answer and not is_answer(answer[0]) for answer in (chosen, rejected))
    if whole and columns.prompt != "prompt":
        prompt = None  # the conversations contain it
    elif columns.prompt not in ("prompt", None) and prompt:
        done.append("column")
    if (columns.chosen, columns.rejected) != ("chosen", "rejected"):
        done.append("column")
    if columns.input is not None and isinstance(prompt, str) and is_filled(row.get(columns.input)):
        prompt = f"{prompt}\n{row[columns.input]}" if prompt.strip() else row[columns.input]
        done.append("input")
    system = None if columns.system is None else row.get(columns.system)
    system = system if isinstance(system, str) and system.strip() else None
    history = read_history(row.get(columns.history)) if columns.history is not None else []
    if history:
        done.append("history")
    pair = Pair(prompt, chosen, rejected, done)
    if not (chosen and rejected):
        return pair
    if pair.is_conversational or as_messages or system or history:
        _read_messages(pair, system, history)
    else:
        _read_texts(pair, cut_prompt)
    return pair


def form_fault(text: Any) -> str | None:
    """Why a value is neither text nor messages, or `None` if it is."""
    if isinstance(text, list) and text and all(isinstance(item, str) for item in text):
        return "several"
    if text is not None and not isinstance(text, str) and not are_messages(text):
        return "not text"
    return "unreadable" if looks_like_messages(text) else None


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def are_messages(value: Any) -> bool:
    """Whether a value is a list of messages with roles."""
    return isinstance(value, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)


def _read_messages(pair: Pair, system: str | None, history: Messages) -> None:
    """Read a pair whose parts are messages, or become messages."""
    if isinstance(pair.chosen, str) or isinstance(pair.rejected, str):
        pair.chosen, pair.rejected = (
            [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
            for answer in (pair.chosen, pair.rejected)
        )
        pair.done.append("answer")
    prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
    shared = chosen[: shared_length(chosen, rejected)]
    if isinstance(prompt, str):
        if not prompt.strip():
            prompt = []
        elif is_answer(chosen[0]) and is_answer(rejected[0]):
            prompt = [{"role": "user", "content": prompt}]
            pair.done.append("question")
        elif any(prompt.strip() in str(m.get("content")) for m in shared if m.get("role") == "user"):
            prompt = []
            pair.done.append("beginning")
        else:
            pair.fault = "another prompt"
            return
    prompt = prompt or []
    head, asked = split_system(prompt)
    own, rest = split_system(shared)
    if asked and rest[: len(asked)] == asked and (not (head and own) or head == own):
        count = len(own) + len(asked)
        prompt = [*(head or own), *asked]
        chosen, rejected, shared = chosen[count:], rejected[count:], shared[count:]
        pair.done.append("repeated")
    elif asked and not (is_answer(chosen[0]) and is_answer(rejected[0])):
        pair.fault = "another prompt"
        return
    if not prompt:  # the common beginning, as in TRL's `extract_prompt`
        opening = len(shared)
        if opening == min(len(chosen), len(rejected)):  # one would be empty: keep its last answer
            opening = max((i for i, message in enumerate(shared) if is_answer(message)), default=0)
    else:
        opening = next((i for i, message in enumerate(shared) if is_answer(message)), len(shared))
        if opening:
            pair.done.append("opening")
    prompt, chosen, rejected = [*prompt, *chosen[:opening]], chosen[opening:], rejected[opening:]
    prompt = [*history, *prompt]
    if system is not None and not has_system(prompt):
        prompt = [{"role": "system", "content": system}, *prompt]
        pair.done.append("system")
    pair.prompt, pair.chosen, pair.rejected = prompt, chosen, rejected


_TURN = re.compile(r"\n\n(?:Human|Assistant):")
_ANSWER = "\n\nAssistant:"


def _read_texts(pair: Pair, cut_prompt: bool) -> None:
    """Read a pair of texts."""
    prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
    if all(is_dialogue(answer) for answer in (chosen, rejected)):
        shared = chosen[: shared_length(chosen, rejected)]
        end = shared.rfind(_ANSWER)
        rest = [answer[end + len(_ANSWER) :] for answer in (chosen, rejected)]
        if prompt and prompt.strip() not in shared:
            pair.fault = "another prompt"
            return
        if end < 0 or any(_TURN.search(answer) for answer in rest):
            pair.fault = "parted dialogues"
            return
        pair.prompt, (pair.chosen, pair.rejected) = shared[: end + len(_ANSWER)], rest
        pair.done.append("dialogue")
    elif cut_prompt and repeats_prompt(pair):
        pair.chosen, pair.rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        pair.done.append("repeated")


def repeats_prompt(pair: Pair) -> bool:
    """Whether both answers, texts, begin with the whole prompt."""
    texts = (pair.prompt, pair.chosen, pair.rejected)
    return (
        all(isinstance(text, str) for text in texts)
        and bool(pair.prompt.strip())
        and begins_with(pair.chosen, pair.prompt)
        and begins_with(pair.rejected, pair.prompt)
    )


def begins_with(text: str, prompt: str) -> bool:
    """Whether a text begins with a prompt and goes on with another word: "11" does not begin with "1"."""
    rest = text[len(prompt) :]
    return text.startswith(prompt) and not (prompt[-1:].isalnum() and rest[:1].isalnum())


def is_dialogue(text: str) -> bool:
    """Whether a text is a dialogue in HH-RLHF's form."""
    return text.lstrip().startswith("Human:") and _ANSWER in text


def shared_length(sequence: Sequence, other: Sequence) -> int:
    """The length of the common beginning."""
    return next(
        (i for i, (a, b) in enumerate(zip(sequence, other, strict=False)) if a != b), min(len(sequence), len(other))
    )


def read_text(value: Any, done: list[str]) -> Text:
    """A column's value as text or messages; any other value is returned unchanged. Conversions are appended to `done`."""
    if isinstance(value, str):
        parsed = parsed_messages(value)
        if parsed is None:
            return value
        done.append("json")
        value = parsed
    if isinstance(value, dict):
        value = [value]
        done.append("message")
    if not isinstance(value, list):
        return value
    if len(value) == 1 and isinstance(value[0], str):
        done.append("list")
        return value[0]
    if all(isinstance(message, dict) for message in value):
        return [read_message(message, done) for message in value]
    return value


def parsed_messages(text: str) -> Messages | None:
    """Parse messages written as JSON or as a Python literal (pandas' CSV); `None` for any other text."""
    if text.lstrip().startswith('"[{'):  # JSON in JSON
        try:
            text = json.loads(text)
        except ValueError:
            return None
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            parsed = parse(text)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
        listed = [parsed] if isinstance(parsed, dict) else parsed
        if isinstance(listed, list) and listed and all(is_message(message) for message in listed):
            return listed
        return None
    return None


def is_message(value: Any) -> bool:
    """Whether a parsed value is a message, in TRL's form or in ShareGPT's, rather than other JSON."""
    if not isinstance(value, dict):
        return False
    role = (
        value.get("role")
        if {"content", "tool_calls"} & value.keys()
        else value.get("from")
        if "value" in value
        else None
    )
    return isinstance(role, str) and (role.strip().lower() in ROLES or role.strip().lower() in STANDARD_ROLES)


_ROLE = re.compile(rf"['\"](role|from)['\"]\s*:\s*['\"]({'|'.join((*STANDARD_ROLES, *ROLES))})['\"]", re.IGNORECASE)


def looks_like_messages(text: Any) -> bool:
    """Whether a text looks like messages that cannot be parsed: an array printed by NumPy, or JSON that was cut off."""
    return (
        isinstance(text, str)
        and re.match(r"\s*\[?\s*\{\s*['\"](role|from|content|value)['\"]\s*:", text) is not None
        and _ROLE.search(text) is not None
    )


def read_message(message: dict[str, Any], done: list[str]) -> dict[str, Any]:
    """A message with TRL's names of `role` and `content`, without the null keys that Arrow adds."""
    if "role" not in message and {"from", "value"} <= message.keys():
        message = {"role": message["from"], "content": message["value"], **message}
        message = {key: value for key, value in message.items() if key not in ("from", "value")}
        done.append("sharegpt")
    message = {key: value for key, value in message.items() if value is not None or key == "content"}
    role, content = message.get("role"), message.get("content")
    if isinstance(role, str) and role not in STANDARD_ROLES:
        known = ROLES.get(role.strip().lower(), role.strip().lower())
        if known in STANDARD_ROLES:
            message["role"] = known
            done.append("role")
    if isinstance(content, str) and content.lstrip().startswith("[{"):
        content = parsed_parts(content) or content
    if isinstance(content, list) and all(isinstance(part, str) or is_text_part(part) for part in content):
        message["content"] = "".join(part if isinstance(part, str) else part["text"] for part in content)
        done.append("parts")
    return message


def is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)


def parsed_parts(content: str) -> list[dict[str, Any]] | None:
    try:
        parts = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return parts if parts and all(is_text_part(part) and "type" in part for part in parts) else None


def read_history(value: Any) -> Messages:
    """LLaMA-Factory's `history`: `[[question, answer], ...]`."""
    if not isinstance(value, list):
        return []
    turns = [turn for turn in value if isinstance(turn, list) and len(turn) == 2]
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def is_answer(message: dict[str, Any]) -> bool:
    return message.get("role") == "assistant"


def split_system(messages: Messages) -> tuple[Messages, Messages]:
    """Split the system messages at the beginning from the others."""
    count = next((i for i, m in enumerate(messages) if m.get("role") not in ("system", "developer")), len(messages))
    return messages[:count], messages[count:]


def has_system(messages: Messages) -> bool:
    return any(message.get("role") == "system" for message in messages)


def is_filled(value: Any) -> bool:
    """Whether a value is not empty: text that is not blank, or a list with items."""
    return bool(value.strip()) if isinstance(value, str) else bool(value)
