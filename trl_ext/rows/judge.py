"""
Judges of every row whether it can be used for training, in messages that trainers, recipes, ARIES and doctor share.

In: a prompt and its answers (none for prompts alone, one for SFT, two for pairs), and later their token ids. Out: [`Findings`], which
count unusable rows by reason, with the number of the first row, what was found there and how to fix it. Whether roles are accepted is
tried with the chat template itself, once for each sequence of roles.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..recipe_values import RecipeError, show
from .formats import Messages, Text, are_messages, begins_with, is_answer, is_filled, looks_like_messages
from .processing import tokenizer_of


# Largest share of rows that may be unusable before training is refused. Our choice
MOST_DROPPED = 0.5

TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")

# Keys of a message for its thought; most templates write one of them or none
THOUGHTS = ("reasoning_content", "reasoning", "thinking")

# Reason -> what is wrong with these rows, and how to fix it
REASONS = {
    "empty answer": ("have an empty answer", "Remove them, or fill in both answers."),
    "no prompt": ("have no prompt", "Fill in `prompt`, or rename the column that holds the question to it."),
    "identical": ("have identical answers", "Remove them: neither answer can be preferred."),
    "another prompt": (
        "have a `prompt` that their conversations do not begin with",
        "Make the prompt messages too: `[{'role': 'user', 'content': ...}]`.",
    ),
    "answered": (
        "have a prompt that ends with an assistant message, so that the answer would be a second one",
        "End the prompt before the answer: `dataset.map(lambda row: {'prompt': row['prompt'][:-1]})`.",
    ),
    "parted dialogues": (
        "have dialogues of `Human:` and `Assistant:` that differ before their last answer",
        "Put the common beginning into `prompt`, and one answer each into `chosen` and `rejected`.",
    ),
    "mixed kinds": ("mix text and messages", "Convert all prompts and answers to one kind."),
    "unreadable": (
        "have text that looks like messages but is not valid JSON",
        "Save the data as JSON lines or Parquet, which keep lists: `dataset.to_json('pairs.jsonl')`.",
    ),
    "several": (
        "have several answers in a list",
        "Choose one of them for each side: `dataset.map(lambda row: {'chosen': row['chosen'][0], 'rejected': row['rejected'][0]})`.",
    ),
    "not text": (
        "have a prompt, an answer or a `content` that is not text",
        "Convert it to text: `dataset.cast_column('chosen', datasets.Value('string'))` for a column of numbers.",
    ),
    "no content": ("have a message whose `content` is null", "Fill it in, or remove the message."),
    "options": (
        "have `tools` or `chat_template_kwargs` that cannot be passed to the chat template",
        "`tools` is a list of JSON schemas, `chat_template_kwargs` a mapping.",
    ),
    "last role": (
        "have an answer that does not begin and end with an assistant message",
        "Answers are messages of the role `assistant`. Move the user's messages to `prompt`.",
    ),
    "role": (
        "have roles that the chat template drops or refuses",
        "Use `system`, `user` and `assistant` in an order that the template accepts, and give each message a `content`; for a template "
        "without tool calls, write them out there.",
    ),
    "rendered turn": (
        "are text that already contains the chat template's tokens, so that Sr-DPO's prompt would be outside of the user's turn",
        "Convert them to messages, which the template renders.",
    ),
    "no tokens": ("have an answer without tokens after rendering", "Check the roles and the chat template."),
    "identical ids": (
        "have answers that are the same tokens after rendering",
        "Remove them, or raise `max_length` if they differ later.",
    ),
    "too long": (
        "have a prompt that alone fills `max_length`",
        "Raise `max_length`, or shorten the prompts.",
    ),
    "no embedding": (
        "have a token for which the model has no embedding",
        "Resize the model's embeddings (`model.resize_token_embeddings(len(tokenizer))`), or use the tokenizer it was trained with.",
    ),
}

# The same for rows that are used all the same
WARNINGS = {
    "no question": (
        "have an empty prompt: it is blank, or there is no column for it and their answers have no common beginning",
        "If another column holds the question, rename it: `dataset.rename_column('task', 'prompt')`.",
    ),
    "repeated": (
        "begin both answers with the whole question",
        "If the model is not meant to learn it, remove it: `dataset.map(lambda row: {'chosen': row['chosen'][len(row['prompt']):]})`.",
    ),
    "unread": (
        "have another column that may contain the question and is not read",
        "If it belongs to the prompt, move it there.",
    ),
    "system column": (
        "have a column `system`, which is not read if the prompt is text",
        "Put it into the prompt, or convert the prompt to messages: then the column is their system message.",
    ),
    "plain text": (
        "are plain text, to which the tokenizer's chat template is not applied",
        "If the model is meant to chat, convert them to messages: `prompt: [{'role': 'user', 'content': ...}]`.",
    ),
    "rendered": (
        "are text that already contains the chat template's tokens",
        "Convert them to messages, which the template renders.",
    ),
    "tools": (
        "have `tools` that the chat template does not show to the model",
        "Use a tokenizer whose template does, or put them into the system message.",
    ),
    "thought": (
        "have a thought beside an answer that the chat template does not write",
        "Rename its key to the one that the template reads, or put the thought into `content` as the model is to write it.",
    ),
    "two BOS": (
        "begin with two BOS tokens, one in the text and one that the tokenizer adds",
        "Remove the BOS token from the text.",
    ),
}


@dataclass
class Findings:
    """
    Counts of rows by reason, with the first row of each.

    Args:
        what (`str`):
            What the rows are called, in the plural: `"rows of the train dataset"`.

    Attributes:
        total (`int`):
            Number of rows judged.
        dropped, warned (`Counter`):
            Rows that cannot be used, and rows that are used although something is odd, by reason.
        first (`dict`):
            For each reason, the number of its first row, counted from 1, and what was found there.
    """

    what: str
    total: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    warned: Counter[str] = field(default_factory=Counter)
    first: dict[str, tuple[int, str]] = field(default_factory=dict)

    def drop(self, reason: str, number: int, seen: str = "") -> None:
        self.dropped[reason] += 1
        self.first.setdefault(reason, (number, seen))

    def warn(self, reason: str, number: int, seen: str = "") -> None:
        self.warned[reason] += 1
        self.first.setdefault(reason, (number, seen))

    def lines(self, counts: Counter[str]) -> list[str]:
        """A line for each reason: how many rows, what is wrong, the first of them, and how to fix it."""
        words = REASONS | WARNINGS
        lines = []
        for reason, count in counts.most_common():
            number, seen = self.first[reason]
            what, fix = words[reason]
            lines.append(
                f"{count:,} of {self.total:,} {self.what} {what} (first: row {number:,}{': ' * bool(seen)}{seen}). {fix}"
            )
        return lines

    @property
    def warnings(self) -> list[str]:
        return self.lines(self.warned)

    @property
    def drops(self) -> list[str]:
        return [f"Left out: {line}" for line in self.lines(self.dropped)]

    def check(self, most: float | None = MOST_DROPPED) -> None:
        """
        Args:
            most (`float`, *optional*):
                Largest share of rows that may be dropped; `None` for any share below all.

        Raises:
            [`RecipeError`]: more rows were dropped, or all.
        """
        count = self.dropped.total()
        if not count or (count < self.total and (most is None or count <= most * self.total)):
            return
        left = "nothing is left" if count >= self.total else f"more than {most:.0%} of them"
        raise RecipeError(" ".join([*self.lines(self.dropped), f"{count:,} in all: {left}."]))


class Judge:
    """
    Judges rows before rendering, tries their roles with the chat template, and judges their tokens.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            The tokenizer or processor that renders them.
        findings ([`Findings`]):
            The counts to add to.
        vocabulary (`int`, *optional*):
            Number of the model's embeddings. Default: not checked.
        takes_rendered (`bool`, *optional*, defaults to `True`):
            Whether text that was already rendered can be used.
    """

    def __init__(
        self,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        findings: Findings,
        vocabulary: int | None = None,
        takes_rendered: bool = True,
    ):
        self.findings = findings
        self._takes_rendered = takes_rendered
        self._vocabulary = vocabulary
        self.processing_class = processing_class
        self.template = processing_class.chat_template
        self._tokenizer = tokenizer_of(processing_class)
        self._takes_parts = isinstance(processing_class, ProcessorMixin)
        self._probed: dict[str, str | None] = {}
        self._unwritten: set[str] = set()  # keys of thoughts
        self._tools_are_read: bool | None = None  # decided by the first row that has some
        special = {token for token in self._tokenizer.all_special_tokens if len(token) > 1}
        template = self.template if isinstance(self.template, str) else str(self.template or "")
        self._own_tokens = [token for token in special if token in template]
        self._beyond = []  # tokens without an embedding
        if vocabulary is not None and len(self._tokenizer) > vocabulary:
            added = self._tokenizer.get_added_vocab()
            self._beyond = [token for token, number in added.items() if number >= vocabulary]

    def row(self, number: int, prompt: Text, answers: Sequence[Text], row: dict[str, Any]) -> bool:
        """
        Judge and count a row.

        Args:
            number (`int`):
                Number of the row, from 1.
            prompt (`str`, `list[dict]` or `None`), answers (sequence of the same):
                The prompt and its answers in TRL's form.
            row (`dict`):
                All of its columns, in any form.

        Returns:
            `bool`: whether it can be used.
        """
        self.findings.total += 1
        found = self._fault(prompt, answers, row)
        if found is not None:
            self.findings.drop(found[0], number, found[1])
            return False
        if isinstance(prompt, str):
            own = next((token for token in self._own_tokens if token in prompt), None)
            if own is not None and not self._takes_rendered:
                self.findings.drop("rendered turn", number, f"{own} in the prompt")
                return False
            if own is not None:
                self.findings.warn("rendered", number, f"{own} in the prompt")
            elif self.template is not None:
                self.findings.warn("plain text", number)
            if is_filled(row.get("system")):
                self.findings.warn("system column", number)
        elif is_filled(row.get("tools")) and self._tools_are_read is False:
            self.findings.warn("tools", number)
        lasts = (answer[-1] for answer in answers if isinstance(answer, list))
        thoughts = [key for last in lasts for key in self._unwritten if is_filled(last.get(key))]
        if thoughts:
            self.findings.warn("thought", number, f"`{thoughts[0]}`")
        if len(answers) == 2 and all(_repeats(prompt, answer) for answer in answers):
            self.findings.warn("repeated", number)
        return True

    def _fault(self, prompt: Text, answers: Sequence[Text], row: dict[str, Any]) -> tuple[str, str] | None:
        """The reason why a row cannot be used and what was found, or `None`."""
        for answer in answers:
            if is_empty(answer):
                return "empty answer", "" if answer is None else show(answer)
        texts = [prompt, *answers]
        odd = next((text for text in texts if looks_like_messages(text)), None)
        if odd is not None:
            return "unreadable", show(odd)
        kinds = {type(text) for text in texts}
        if not kinds <= {str, list, type(None)} or any(not are_messages(t) for t in texts if isinstance(t, list)):
            return "not text", ", ".join(sorted(f"{type(text).__name__}" for text in texts))
        if len(answers) == 2 and answers[0] == answers[1]:
            return "identical", show(answers[0])
        if prompt is None or (not is_filled(prompt) and (isinstance(prompt, list) or _other_prompts(row))):
            others = _other_prompts(row)
            return "no prompt", f"`{others[0]}` is not empty" if others else f"columns {', '.join(row)}"
        for token in self._beyond:
            if any(token in str(text) for text in texts):
                return (
                    "no embedding",
                    f"{show(token)} is beyond the model's {self._vocabulary:,} embeddings",
                )
        if len(kinds) > 1:
            return "mixed kinds", ", ".join("messages" if isinstance(text, list) else "text" for text in texts)
        return None if isinstance(prompt, str) else self._fault_of_messages(prompt, answers, row)

    def _fault_of_messages(self, prompt: Messages, answers: Sequence[Messages], row: dict[str, Any]):
        for message in [*prompt, *(message for answer in answers for message in answer)]:
            content = message.get("content")
            if content is None and not message.get("tool_calls"):
                return "no content", f"role {show(message.get('role'))}"
            if not isinstance(content, str | None) and not (self._takes_parts and isinstance(content, list)):
                return "not text", f"{type(content).__name__} in a message of the role {show(message.get('role'))}"
        if is_answer(prompt[-1]):
            return "answered", f"roles {_roles(prompt)}"
        for answer in answers:
            if not (is_answer(answer[0]) and is_answer(answer[-1])):
                return "last role", f"roles {_roles(prompt)} | {_roles(answer)}"
        if self.template is None:
            raise RecipeError(
                "the rows are messages, but the tokenizer has no chat template. Add one (`trl.clone_chat_template`), or convert the "
                "rows to plain text."
            )
        try:
            template_options(row)
        except (TypeError, ValueError) as error:
            return "options", str(error)
        for answer in answers or [[]]:
            problem = self._probe(prompt, answer, row)
            if problem is not None:
                return "role", f"roles {_roles(prompt)}{f' | {_roles(answer)}' if answer else ''}; {problem}"
        return None

    def _probe(self, prompt: Messages, answer: Messages, row: dict[str, Any]) -> str | None:
        """
        What the template does wrong with this sequence of roles, or `None` if it renders all of them. Each text, and the function's name in
        each tool call, is replaced by a mark that can be found in the rendered text.
        """
        if self._takes_parts:  # templates of processors take parts; TRL makes them
            return None
        options = template_options(row)
        key = json.dumps([[_kind(m) for m in prompt], [_kind(m) for m in answer], options], default=str)
        if key not in self._probed:
            self._probed[key] = self._ask(prompt, answer, options)
        return self._probed[key]

    def _ask(self, prompt: Messages, answer: Messages, options: dict[str, Any]) -> str | None:
        messages, marks = [], []
        for index, message in enumerate([*prompt, *answer]):
            mark, calls = f"text{index}mark", _renamed(message.get("tool_calls"), f"text{index}mark")
            if calls:
                marks.append((f"the tool calls of `{message['role']}`", mark))
                message = {**message, "tool_calls": calls}
            elif isinstance(message.get("content"), str) and not message.get("tool_calls"):
                marks.append((f"`{message['role']}`", mark))
                message = {**message, "content": mark}
            messages.append(message)
        thoughts = {key: f"{key}mark" for key in messages[-1] if key in THOUGHTS and answer}
        messages[-1] = {**messages[-1], **thoughts}
        try:
            rendered = self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
            if options["tools"] and self._tools_are_read is None:
                without = {**options, "tools": None}
                self._tools_are_read = rendered != self._tokenizer.apply_chat_template(
                    messages, tokenize=False, **without
                )
            if not answer:
                self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
        except Exception as error:  # the template's own code may raise anything
            return f"the template refuses them: {error}"
        self._unwritten |= {key for key, mark in thoughts.items() if mark not in rendered}
        missing = [what for what, mark in marks if mark not in rendered]
        return f"the template drops {', '.join(missing)}" if missing else None

    def ids(self, prepared: Any, numbers: Sequence[int], max_length: int | None) -> np.ndarray:
        """
        Judge the token ids of pairs.

        Args:
            prepared (`datasets.Dataset`):
                With TRL's columns `prompt_ids`, `chosen_ids` and `rejected_ids`.
            numbers (sequence of `int`):
                The number of each row, for the findings.
            max_length (`int`, *optional*):
                Length at which the end of sequences is cut off; `None` if it is not cut.

        Returns:
            `np.ndarray` of shape `(len(prepared),)`: whether each row can be used.
        """
        usable = np.ones(len(prepared), dtype=bool)
        start = 0
        for table in prepared.select_columns(list(TOKENS)).with_format("arrow").iter(batch_size=1000):
            columns = [_lists(table[name]) for name in TOKENS]
            for index in range(len(table)):
                prompt, *answers = (values[offsets[index] : offsets[index + 1]] for values, offsets in columns)
                number = numbers[start + index]
                usable[start + index] = self.row_ids(number, prompt, answers, max_length)
            start += len(table)
        return usable

    def row_ids(
        self,
        number: int,
        prompt: np.ndarray,
        answers: Sequence[np.ndarray],
        max_length: int | None,
    ) -> bool:
        """Judge and count one row by its token ids, with the arguments of [`ids`]. Returns whether it can be used."""
        found = self._fault_of_ids(prompt, answers, max_length)
        if found is not None:
            self.findings.drop(found[0], number, found[1])
            return False
        bos = self._tokenizer.bos_token_id
        if bos is not None and len(prompt) > 1 and prompt[0] == prompt[1] == bos:
            self.findings.warn("two BOS", number)
        return True

    def _fault_of_ids(
        self, prompt: np.ndarray, answers: Sequence[np.ndarray], max_length: int | None
    ) -> tuple[str, str] | None:
        if max_length is not None and len(prompt) >= max_length:
            return "too long", f"{len(prompt):,} tokens"
        if any(len(answer) == 0 for answer in answers):
            return "no tokens", ""
        kept = [answer if max_length is None else answer[: max_length - len(prompt)] for answer in answers]
        if len(kept) == 2 and np.array_equal(*kept):
            cut = "" if len(kept[0]) == len(answers[0]) else f"in the {len(kept[0]):,} tokens that `max_length` leaves"
            return "identical ids", cut
        if self._vocabulary is not None:
            largest = max(int(ids.max()) for ids in (prompt, *answers) if len(ids))
            if largest >= self._vocabulary:
                token = show(self._tokenizer.convert_ids_to_tokens(largest))
                return "no embedding", f"{token} is {largest:,}, and the model has {self._vocabulary:,} embeddings"
        return None


def template_options(row: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a row's own columns give to the chat template: tools and `chat_template_kwargs`."""
    tools = row.get("tools")
    tools = json.loads(tools) if is_filled(tools) and isinstance(tools, str) else tools
    return {"tools": tools or None, **(row.get("chat_template_kwargs") or {})}


def is_empty(answer: Any) -> bool:
    """Whether an answer is empty: text without a character, or messages whose last one has neither content nor tool calls."""
    if isinstance(answer, list) and answer and isinstance(answer[-1], dict):
        answer = answer[-1].get("content") or answer[-1].get("tool_calls")
    return not is_filled(answer)


def _other_prompts(row: dict[str, Any]) -> list[str]:
    """Non-empty columns that may contain the prompt of a row whose `prompt` is empty."""
    names = ("question", "instruction", "query", "input", "context", "system", "messages", "conversations")
    return [name for name in names if is_filled(row.get(name))]


def _repeats(prompt: Text, answer: Text) -> bool:
    """Whether an answer begins with the question."""
    question = prompt if isinstance(prompt, str) else prompt[-1].get("content")
    text = answer if isinstance(answer, str) else answer[0].get("content")
    texts = isinstance(question, str) and isinstance(text, str)
    return texts and bool(question.strip()) and begins_with(text.lstrip(), question.strip())


def _roles(messages: Messages) -> str:
    return ", ".join(str(message.get("role")) for message in messages) or "none"


def _kind(message: dict[str, Any]) -> list[str]:
    """What distinguishes a message for the template: its role and keys, and its whole content if it has tool calls."""
    if message.get("tool_calls"):
        return [message["role"], json.dumps(message, default=str)]
    return [message["role"], *sorted(message)]


def _renamed(calls: Any, name: str) -> list[dict[str, Any]] | None:
    """Tool calls with another name of the function; `None` if they are not in a form that templates know."""
    renamed = []
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or "name" not in function:
            return None
        function = {**function, "name": name}
        renamed.append({**call, "function": function} if "function" in call else function)
    return renamed or None


def _lists(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Values and offsets of a column of lists."""
    array = column.combine_chunks()
    offsets = array.offsets.to_numpy()
    return array.values.to_numpy(zero_copy_only=False), offsets
