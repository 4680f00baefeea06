"""
Two pairs in the shapes in which people publish them. Each entry: rows as published, and the same rows in TRL's form, by hand; the oracle
of every conversion. Words are those of the tests' tiny tokenizer, so that nothing becomes `<unk>`.
"""

import json

import numpy as np


Q = ("what is one plus two ?", "why is the sky blue ?")
GOOD = ("three .", "because short waves scatters more .")
BAD = ("four .", "because the sea is blue .")


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def rows(make) -> list[dict]:
    return [make(*parts) for parts in zip(Q, GOOD, BAD, strict=True)]


MESSAGES = rows(lambda q, good, bad: {"prompt": [user(q)], "chosen": [assistant(good)], "rejected": [assistant(bad)]})
TEXT = rows(lambda q, good, bad: {"prompt": q, "chosen": " " + good, "rejected": " " + bad})
WITH_SYSTEM = [{**row, "prompt": [system("You are brief ."), *row["prompt"]]} for row in MESSAGES]
DIALOGUE = rows(
    lambda q, good, bad: {"prompt": f"\n\nHuman: {q}\n\nAssistant:", "chosen": " " + good, "rejected": " " + bad}
)
LONGER = [{**row, "prompt": [user("what runs ?"), assistant("the fox runs ."), *row["prompt"]]} for row in MESSAGES]


def turn(who: str, text: str) -> dict:
    return {"from": who, "value": text}


def part(text: str) -> list[dict]:
    return [{"type": "text", "text": text}]


CONVERTED = {
    "messages": (MESSAGES, MESSAGES),
    "text": (TEXT, TEXT),
    "whole conversations": (
        rows(lambda q, good, bad: {"chosen": [user(q), assistant(good)], "rejected": [user(q), assistant(bad)]}),
        MESSAGES,
    ),
    "UltraFeedback, binarized": (
        rows(
            lambda q, good, bad: {
                "prompt": q,
                "prompt_id": "1",
                "chosen": [user(q), assistant(good)],
                "rejected": [user(q), assistant(bad)],
                "messages": [user(q), assistant(good)],
                "score_chosen": 9.0,
                "score_rejected": 2.0,
            }
        ),
        MESSAGES,
    ),
    "the prompt again in both answers": (
        rows(
            lambda q, good, bad: {
                "prompt": [user(q)],
                "chosen": [user(q), assistant(good)],
                "rejected": [user(q), assistant(bad)],
            }
        ),
        MESSAGES,
    ),
    "the question left in the answers": (
        rows(
            lambda q, good, bad: {
                "prompt": [system("You are brief .")],
                "chosen": [user(q), assistant(good)],
                "rejected": [user(q), assistant(bad)],
            }
        ),
        WITH_SYSTEM,
    ),
    "text prompt beside messages": (
        rows(lambda q, good, bad: {"prompt": q, "chosen": [assistant(good)], "rejected": [assistant(bad)]}),
        MESSAGES,
    ),
    "messages prompt beside text": (
        rows(lambda q, good, bad: {"prompt": [user(q)], "chosen": good, "rejected": bad}),
        MESSAGES,
    ),
    "ShareGPT": (
        rows(
            lambda q, good, bad: {
                "chosen": [turn("human", q), turn("gpt", good)],
                "rejected": [turn("human", q), turn("gpt", bad)],
            }
        ),
        MESSAGES,
    ),
    "ShareGPT with a system turn": (
        rows(
            lambda q, good, bad: {
                "chosen": [turn("system", "You are brief ."), turn("human", q), turn("gpt", good)],
                "rejected": [turn("system", "You are brief ."), turn("human", q), turn("gpt", bad)],
            }
        ),
        WITH_SYSTEM,
    ),
    "role gpt": (
        rows(
            lambda q, good, bad: {
                "prompt": [{"role": "Human", "content": q}],
                "chosen": [{"role": "gpt", "content": good}],
                "rejected": [{"role": "Assistant", "content": bad}],
            }
        ),
        MESSAGES,
    ),
    "LLaMA-Factory's ShareGPT": (
        rows(
            lambda q, good, bad: {
                "conversations": [turn("human", q)],
                "chosen": turn("gpt", good),
                "rejected": turn("gpt", bad),
            }
        ),
        MESSAGES,
    ),
    "LLaMA-Factory's Alpaca": (
        rows(
            lambda q, good, bad: {
                "instruction": q.rpartition(" is ")[0],
                "input": "is " + q.rpartition(" is ")[2],
                "chosen": good,
                "rejected": bad,
                "system": "You are brief .",
                "history": [["what runs ?", "the fox runs ."]],
            }
        ),
        rows(
            lambda q, good, bad: {
                "prompt": [
                    system("You are brief ."),
                    user("what runs ?"),
                    assistant("the fox runs ."),
                    user(q.replace(" is ", "\nis ")),
                ],
                "chosen": [assistant(good)],
                "rejected": [assistant(bad)],
            }
        ),
    ),
    "axolotl's chat_template": (
        [{"messages": row["prompt"], "chosen": row["chosen"][0], "rejected": row["rejected"][0]} for row in LONGER],
        LONGER,
    ),
    "Orca": (
        rows(lambda q, good, bad: {"system": "You are brief .", "question": q, "chosen": good, "rejected": bad}),
        WITH_SYSTEM,
    ),
    "Orca, without a system message": (
        rows(lambda q, good, bad: {"system": "", "question": q, "chosen": good, "rejected": bad}),
        rows(lambda q, good, bad: {"prompt": q, "chosen": good, "rejected": bad}),
    ),
    "Argilla": (
        rows(
            lambda q, good, bad: {
                "system": "You are brief .",
                "instruction": q,
                "chosen_response": good,
                "rejected_response": bad,
            }
        ),
        WITH_SYSTEM,
    ),
    "StackExchange": (
        rows(lambda q, good, bad: {"question": q, "response_j": good, "response_k": bad}),
        rows(lambda q, good, bad: {"prompt": q, "chosen": good, "rejected": bad}),
    ),
    "system column": (
        rows(lambda q, good, bad: {"system": "You are brief .", "prompt": q, "chosen": good, "rejected": bad}),
        WITH_SYSTEM,
    ),
    "system column beside messages": ([{**row, "system": "You are brief ."} for row in MESSAGES], WITH_SYSTEM),
    "JSON in text": ([{key: json.dumps(value) for key, value in row.items()} for row in MESSAGES], MESSAGES),
    "Python literals in text": ([{key: repr(value) for key, value in row.items()} for row in MESSAGES], MESSAGES),
    "parts of text": (
        rows(
            lambda q, good, bad: {
                "prompt": [{"role": "user", "content": part(q)}],
                "chosen": [{"role": "assistant", "content": part(good)}],
                "rejected": [{"role": "assistant", "content": part(bad)}],
            }
        ),
        MESSAGES,
    ),
    "lists of one text": (
        rows(lambda q, good, bad: {"prompt": q, "chosen": [" " + good], "rejected": [" " + bad]}),
        TEXT,
    ),
    "HH-RLHF": (
        [{key: row["prompt"] + row[key] for key in ("chosen", "rejected")} for row in DIALOGUE],
        DIALOGUE,
    ),
    "HH-RLHF with a prompt": (DIALOGUE, DIALOGUE),
    "HH-RLHF with the prompt again": (
        [
            {"prompt": row["prompt"], **{key: row["prompt"] + row[key] for key in ("chosen", "rejected")}}
            for row in DIALOGUE
        ],
        DIALOGUE,
    ),
    "the text prompt again in both answers": (
        [
            {"prompt": row["prompt"], **{key: row["prompt"] + row[key] for key in ("chosen", "rejected")}}
            for row in TEXT
        ],
        TEXT,
    ),
    "template options in some rows": (
        [
            {**MESSAGES[0], "chat_template_kwargs": None},
            {**MESSAGES[1], "chat_template_kwargs": {"enable_thinking": False}},
        ],
        [
            {**MESSAGES[0], "chat_template_kwargs": {}},
            {**MESSAGES[1], "chat_template_kwargs": {"enable_thinking": False}},
        ],
    ),
}

# Rows that are not pairs, or whose better answer is unknown, and a part of their error
REFUSED = {
    "KTO": ([{"prompt": "a", "completion": "b", "label": True}], "columns of KTO's unpaired answers"),
    "UltraFeedback": (
        [{"instruction": "a", "completions": [{"response": "b"}]}],
        "UltraFeedback's answers with ratings",
    ),
    "Nectar": ([{"prompt": "a", "answers": [{"answer": "b", "rank": 1}]}], "ranked answers (Nectar)"),
    "PKU-SafeRLHF": ([{"prompt": "a", "response_0": "b", "response_1": "c"}], "PKU-SafeRLHF"),
    "HelpSteer3": ([{"context": "a", "response1": "b", "response2": "c"}], "HelpSteer3"),
    "Arena": ([{"conversation_a": [], "conversation_b": [], "winner": "model_a"}], "Chatbot Arena"),
    "AlpacaFarm": ([{"instruction": "a", "output_1": "b", "output_2": "c"}], "AlpacaFarm"),
    "SHP": ([{"history": "a", "human_ref_A": "b", "human_ref_B": "c", "labels": 1}], "SHP"),
    "SFT": ([{"messages": MESSAGES[0]["prompt"] + MESSAGES[0]["chosen"]}], "conversations to imitate"),
    "prompt and completion": ([{"prompt": "a", "completion": "b"}], "prompts with one answer"),
    "other columns": ([{"better": "a", "worse": "b"}], "no column `chosen` and `rejected`; found `better`, `worse`"),
    "an array that was printed": (
        [{key: str(np.array(value)) for key, value in row.items()} for row in LONGER],
        "looks like messages",
    ),
    "several answers in a list": (
        [{"prompt": "a", "chosen": ["b", "c"], "rejected": ["d", "e"]}],
        "have several answers in a list",
    ),
}

# A third row, beside two that are fine, and what is said of it
ODD = {
    "null answer": ({"prompt": [user("a")], "chosen": None, "rejected": [assistant("b")]}, "have an empty answer"),
    "blank answer": (
        {"prompt": [user("a")], "chosen": [assistant(" ")], "rejected": [assistant("b")]},
        "have an empty answer",
    ),
    "identical": (
        {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("b")]},
        "have identical answers",
    ),
    "null prompt": ({"prompt": None, "chosen": [assistant("b")], "rejected": [assistant("c")]}, "have no prompt"),
    "null content": (
        {"prompt": [{"role": "user", "content": None}], "chosen": [assistant("b")], "rejected": [assistant("c")]},
        "a message whose `content` is null",
    ),
    "last role": (
        {"prompt": [user("a")], "chosen": [assistant("b"), user("c")], "rejected": [assistant("d"), user("e")]},
        "does not begin and end with an assistant message",
    ),
    "other questions": (
        {"prompt": [system("a")], "chosen": [user("b"), assistant("c")], "rejected": [user("d"), assistant("e")]},
        "does not begin and end with an assistant message",
    ),
}
