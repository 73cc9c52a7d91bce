# Copyright 2026 The trl_bpo authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""What a prompt is, for every stage: its identity, its text, and how to find it in a transcript."""

import hashlib
import json
import re
from typing import Any


# A turn of an HH-RLHF transcript starts with a blank line and the speaker's name.
# As much of a prompt as is kept to tell it by.
EXCERPT_CHARACTERS = 200

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def without_none(value: Any) -> Any:
    """
    The value without dictionary entries that are None.

    Arrow fills the keys that a message lacks with None as soon as another message of the column has them, so a message
    with `tool_calls=None` is the message without the key.

    Args:
        value (`Any`):
            A JSON-like value.

    Returns:
        `Any`: A copy of it without them.
    """
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_none(item) for item in value]
    return value


def _sha256(value: Any) -> str:
    canonical = json.dumps(without_none(value), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def parse_tools(tools: str | list | None) -> list | None:
    """
    Tool schemas as a list.

    Args:
        tools (`str` or `list`, *optional*):
            Tool schemas of a row, as a list or as its JSON string.

    Returns:
        `list`, *optional*: The schemas, `None` if there are none.
    """
    return (json.loads(tools) if isinstance(tools, str) and tools else tools) or None


def prompt_id(prompt: str | list[dict], tools: str | list | None = None) -> str:
    """
    Content hash of a prompt: the same prompt has the same id in every dataset, run and machine.

    Args:
        prompt (`str` or `list[dict]`):
            Prompt in TRL's standard (`str`) or conversational (list of messages) format.
        tools (`str` or `list`, *optional*):
            Tool schemas of the row, as a list or as its JSON string.

    Returns:
        `str`: SHA-256 hex digest of the canonical JSON of prompt and tools.
    """
    return _sha256({"prompt": prompt, "tools": parse_tools(tools)})


def pair_id(
    prompt: str | list[dict],
    chosen: str | list[dict],
    rejected: str | list[dict],
    tools: str | list | None = None,
) -> str:
    """
    Content hash of a preference pair.

    Args:
        prompt (`str` or `list[dict]`):
            Prompt in TRL's standard or conversational format.
        chosen (`str` or `list[dict]`):
            Preferred completion.
        rejected (`str` or `list[dict]`):
            Dispreferred completion.
        tools (`str` or `list`, *optional*):
            Tool schemas of the row, as a list or as its JSON string.

    Returns:
        `str`: SHA-256 hex digest of the canonical JSON of the pair. Swapping `chosen` and `rejected` changes it.
    """
    return _sha256({"prompt": prompt, "chosen": chosen, "rejected": rejected, "tools": parse_tools(tools)})


def message_text(message: dict) -> str:
    """
    Text of one message: its `content`, or the text parts of a content list, and the tool calls as JSON.

    Args:
        message (`dict`):
            A message with the keys `role` and `content`, and optionally `tool_calls`.

    Returns:
        `str`: The text, empty for a message without any.
    """
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "\n".join(part.get("text") or "" for part in content if part.get("type") == "text")
    calls = without_none(message.get("tool_calls") or [])
    return "\n".join(filter(None, [content, *(json.dumps(call, ensure_ascii=False) for call in calls)]))


def completion_text(completion: str | list[dict]) -> str:
    """
    Text of a completion in either of TRL's formats.

    Args:
        completion (`str` or `list[dict]`):
            Completion in TRL's standard or conversational format.

    Returns:
        `str`: The text of the completion; messages are joined by blank lines.
    """
    if isinstance(completion, str):
        return completion
    return "\n\n".join(message_text(message) for message in completion)


def render_prompt(prompt: str | list[dict], tools: str | list | None = None) -> str:
    """
    Readable text of a prompt, as it is embedded and as it is shown to a judge.

    A single user message without tools is rendered as its bare text, so that a plain question and the same question as
    a conversation read alike. Longer conversations are rendered as one `role: text` block a message.

    Args:
        prompt (`str` or `list[dict]`):
            Prompt in TRL's standard or conversational format.
        tools (`str` or `list`, *optional*):
            Tool schemas of the row, as a list or as its JSON string.

    Returns:
        `str`: The rendered text.
    """
    tools = parse_tools(tools)
    if isinstance(prompt, str):
        blocks = [prompt]
    elif len(prompt) == 1 and prompt[0]["role"] == "user":
        blocks = [message_text(prompt[0])]
    else:
        blocks = [f"{message['role']}: {message_text(message)}" for message in prompt]
    if tools:
        blocks.insert(0, "tools: " + json.dumps(without_none(tools), sort_keys=True, ensure_ascii=False))
    return "\n\n".join(blocks)


def is_transcript(text: Any) -> bool:
    """
    Whether a text is an HH-RLHF transcript: it opens with a `Human:` turn and has an `Assistant:` turn.

    Args:
        text (`Any`):
            Value of a `chosen`, `rejected` or `prompt` column.

    Returns:
        `bool`: `True` for a transcript.
    """
    return isinstance(text, str) and text.startswith("\n\nHuman:") and "\n\nAssistant:" in text


def split_transcript(text: str) -> tuple[str, str]:
    """
    Split an HH-RLHF transcript into prompt and completion at its last `Assistant:` turn.

    TRL's [`~trl.extract_prompt`] takes the longest common prefix of the two answers as the prompt, which swallows the
    words that both answers begin with.

    Args:
        text (`str`):
            Transcript as in the `chosen` and `rejected` columns of HH-RLHF.

    Returns:
        `tuple[str, str]`: The prompt, up to and with the last `"\\n\\nAssistant:"`, and the completion with its leading
        space.
    """
    marker = "\n\nAssistant:"
    start = text.rindex(marker) + len(marker)
    return text[:start], text[start:]


def transcript_to_messages(prompt: str) -> list[dict[str, str]]:
    """
    Turn the prompt part of an HH-RLHF transcript into messages.

    Args:
        prompt (`str`):
            First element of [`split_transcript`]'s result.

    Returns:
        `list[dict[str, str]]`: User and assistant messages; the empty assistant turn at the end is left out.
    """
    pieces = _TURN.split(prompt)[1:]
    turns = [
        {"role": _ROLES[role], "content": text.strip()} for role, text in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    return turns[:-1] if turns and not turns[-1]["content"] else turns
