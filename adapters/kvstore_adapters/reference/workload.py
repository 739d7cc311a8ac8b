"""The demo's texts as sessions of prompts: a conversation and a document with questions.

Requests of a session come one after the other, as from one person, and share most of their prefix:
a turn of the conversation has all turns before it, a question has the document. What the assistant
said is part of the text, so prompts do not depend on the model and every run sees the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from .results import Prompt
from .tokenizer import Tokenizer


def _read(name: str) -> str:
    return resources.files(__package__).joinpath("data", name).read_text(encoding="utf-8")


def conversation_texts() -> list[str]:
    """The prompt of each turn of the conversation."""
    script: dict[str, Any] = json.loads(_read("conversation.json"))
    text, prompts = f"System: {script['system']}\n", []
    for turn in script["turns"]:
        text += f"User: {turn['user']}\nAssistant:"
        prompts.append(text)
        text += f" {turn['assistant']}\n"
    return prompts


def document_tokens(tokenizer: Tokenizer, tokens_max: int | None) -> list[int]:
    """The document's first `tokens_max` tokens."""
    return tokenizer.encode(_read("document.txt"))[:tokens_max]


def question_tokens(tokenizer: Tokenizer, document: Sequence[int]) -> list[list[int]]:
    """The prompt of each question about the document."""
    beginning = tokenizer.encode("")  # some tokenizers begin every text with a token of its own
    prompts = []
    for question in json.loads(_read("questions.json")):
        tail = tokenizer.encode(f"\nQuestion: {question}\nAnswer:")
        prompts.append([*document, *tail[len(beginning) :]])
    return prompts


def make_sessions(
    tokenizer: Tokenizer, num_requests: int, max_new_tokens: int, document_tokens_max: int | None
) -> list[list[Prompt]]:
    """`num_requests` prompts, taken from both sessions in turn.

    Beyond the texts that there are, further pairs of sessions begin, whose prompts share nothing
    with the others.
    """
    document = document_tokens(tokenizer, document_tokens_max)
    talk = [tokenizer.encode(text) for text in conversation_texts()]
    questions = question_tokens(tokenizer, document)
    sessions: list[list[Prompt]] = []
    copy = 0
    while num_requests > 0:
        pair = {"turn": talk, "question": questions}
        made: dict[str, list[Prompt]] = {name: [] for name in pair}
        for index in range(max(len(talk), len(questions))):
            for name, prompts in pair.items():
                if index < len(prompts) and num_requests > 0:
                    tokens = prompts[index]
                    if copy:
                        tokens = [*tokenizer.encode(f"Copy {copy + 1}.\n"), *tokens]
                    label = f"{name} {index + 1}" + (f" copy {copy + 1}" if copy else "")
                    made[name].append(Prompt(label, tokens, max_new_tokens))
                    num_requests -= 1
        sessions += [session for session in made.values() if session]
        copy += 1
    return sessions
