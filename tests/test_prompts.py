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


import json

import pytest
from datasets import Dataset
from trl import extract_prompt

from trl_bpo.prompts import (
    completion_text,
    is_transcript,
    message_text,
    pair_id,
    prompt_id,
    render_prompt,
    split_transcript,
    transcript_to_messages,
)


USER = {"role": "user", "content": "What is the weather in Rome?"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"city": "string"}}}]
HISTORY = "\n\nHuman: Hi.\n\nAssistant: Hello!\n\nHuman: What is a sea?\n\nAssistant:"


def test_prompt_id_survives_the_keys_that_arrow_fills_with_none():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather"}}]}
    prompts = [[USER], [USER, call]]
    filled = Dataset.from_dict({"prompt": prompts})["prompt"]
    assert "tool_calls" in filled[0][0]  # what Arrow made of it
    assert [prompt_id(prompt) for prompt in filled] == [prompt_id(prompt) for prompt in prompts]


def test_prompt_id_is_the_content():
    assert prompt_id("a") == prompt_id("a")
    assert len({prompt_id(p) for p in ("a", "A", "a ", [USER], [{**USER, "role": "system"}], [USER, USER])}) == 6
    assert prompt_id([USER]) == prompt_id([dict(reversed(USER.items()))])
    assert prompt_id("café") != prompt_id("cafe")


def test_prompt_id_is_the_same_on_every_machine():
    # Ids are stored in datasets and on the Hub: if this hash changes, they no longer match.
    assert prompt_id("What is the capital of France?") == (
        "43c3d77a908074ddfcbd83bf62ab47d2f06b19a3f568a9412ebd49a615257866"
    )


def test_prompt_id_and_tools():
    assert prompt_id([USER], TOOLS) == prompt_id([USER], json.dumps(TOOLS))
    assert prompt_id([USER], TOOLS) != prompt_id([USER])
    assert prompt_id([USER], TOOLS) != prompt_id([USER], [*TOOLS, *TOOLS])
    filled = Dataset.from_dict({"tools": [TOOLS, [{"type": "function", "strict": True}]]})["tools"]
    assert prompt_id([USER], filled[0]) == prompt_id([USER], TOOLS)


@pytest.mark.parametrize("none", [None, [], "", "[]", "null"])
def test_no_tools_in_any_spelling(none):
    assert prompt_id([USER], none) == prompt_id([USER])
    assert pair_id([USER], "a", "b", none) == pair_id([USER], "a", "b")
    assert render_prompt([USER], none) == render_prompt([USER])


def test_pair_id():
    assert pair_id("p", "a", "b") == pair_id("p", "a", "b")
    others = [pair_id("p", "b", "a"), pair_id("q", "a", "b"), pair_id("p", "a", "c"), pair_id("p", "a", "b", TOOLS)]
    assert len({pair_id("p", "a", "b"), *others}) == 5
    assert pair_id("p", "a", "b", TOOLS) == pair_id("p", "a", "b", json.dumps(TOOLS))


def test_message_text():
    assert message_text(USER) == USER["content"]
    assert message_text({"role": "assistant", "content": None}) == ""
    parts = [{"type": "text", "text": "one"}, {"type": "image", "text": None}, {"type": "text", "text": "two"}]
    assert message_text({"role": "user", "content": parts}) == "one\ntwo"
    call = {"function": {"name": "weather", "arguments": None}}
    assert message_text({"role": "assistant", "content": "Let me see.", "tool_calls": [call]}) == (
        'Let me see.\n{"function": {"name": "weather"}}'
    )


def test_completion_text():
    assert completion_text(" Rome.") == " Rome."
    assert completion_text([{"role": "assistant", "content": "Rome."}, {"role": "user", "content": "Sure?"}]) == (
        "Rome.\n\nSure?"
    )


def test_render_prompt():
    assert render_prompt("What?") == render_prompt([{"role": "user", "content": "What?"}]) == "What?"
    system = {"role": "system", "content": "Be brief."}
    assert render_prompt([system, USER]) == f"system: Be brief.\n\nuser: {USER['content']}"
    assert render_prompt([system]) == "system: Be brief."
    with_tools = render_prompt([USER], TOOLS)
    assert with_tools == render_prompt([USER], json.dumps(TOOLS))
    assert with_tools.endswith(USER["content"]) and '"weather"' in with_tools


def test_transcript_is_split_at_the_last_assistant_turn():
    prompt, completion = split_transcript(HISTORY + " The sea is wide.")
    assert prompt == HISTORY and completion == " The sea is wide."
    assert split_transcript(HISTORY) == (HISTORY, "")


def test_answers_that_begin_alike_keep_their_first_words():
    chosen, rejected = HISTORY + " The sea is wide.", HISTORY + " The sea is wet."
    split = {"prompt": HISTORY, "chosen": " The sea is wide.", "rejected": " The sea is wet."}
    prompts = {split_transcript(chosen)[0], split_transcript(rejected)[0]}
    assert prompts == {split["prompt"]}
    assert [split_transcript(text)[1] for text in (chosen, rejected)] == [split["chosen"], split["rejected"]]
    # The common prefix, which is what TRL takes, reaches into the answers.
    assert extract_prompt({"chosen": chosen, "rejected": rejected})["prompt"] == HISTORY + " The sea is w"


def test_what_is_a_transcript():
    assert is_transcript(HISTORY)
    for other in ("What?", "\n\nHuman: Hi.", "\n\nAssistant: Hi.", "x\n\nHuman: a\n\nAssistant: b", [USER], None, 3):
        assert not is_transcript(other)


def test_transcript_to_messages():
    assert transcript_to_messages(HISTORY) == [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "What is a sea?"},
    ]
    # A name within a line opens no turn, and text may run over several lines.
    text = "\n\nHuman: He said: Human: no.\n\nSecond paragraph.\n\nAssistant:"
    assert transcript_to_messages(text) == [{"role": "user", "content": "He said: Human: no.\n\nSecond paragraph."}]
    # Without the open turn of the assistant at the end nothing is left out.
    assert transcript_to_messages("\n\nHuman: Hi.\n\nAssistant: Hello!")[-1]["content"] == "Hello!"
    assert transcript_to_messages("") == []
