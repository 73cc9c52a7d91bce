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


"""Questions and judge prompts of our own in the layout of MT-Bench's published files."""

import json
from pathlib import Path


CONVERSATION = "### User:\n{{question_1}}\n\n### Assistant {0}:\n{{answer{1}_1}}\n\n### User:\n{{question_2}}\n\n### Assistant {0}:\n{{answer{1}_2}}"
REFERENCE = "[Reference]\n{ref_answer_1}\n[End of Reference]\n\n"
REFERENCES = "<|Reference|>\n{ref_answer_1}\n{ref_answer_2}\n<|End of Reference|>\n\n"
ANSWER = "[Answer {0}]\n{{answer{1}}}\n[End of Answer {0}]"
QUESTIONS = [
    {
        "question_id": 1,
        "category": "writing",
        "turns": ["Write about {the sea}.", "Now {answer} in one word."],
        "reference": None,
    },
    {
        "question_id": 2,
        "category": "math",
        "turns": ["What is 2 + 2?", "And twice that?"],
        "reference": ["It is 4.", "It is 8."],
    },
]


def judge_prompts() -> list[dict]:
    prompts = []
    for turns in ("", "-multi-turn"):
        for name, reference in (("v1", ""), ("math-v1", REFERENCES if turns else REFERENCE)):
            one = CONVERSATION.format("A", "") if turns else "[Question]\n{question}\n\n" + ANSWER.format("A", "")
            two = (
                CONVERSATION.format("A", "_a") + "\n\n" + CONVERSATION.format("B", "_b")
                if turns
                else "[Question]\n{question}\n\n" + ANSWER.format("A", "_a") + "\n\n" + ANSWER.format("B", "_b")
            )
            single, pair = f"single-{name}{turns}", f"pair-{'v2' if name == 'v1' else name}{turns}"
            prompts.append({"name": single, "system_prompt": f"Grade: {single}", "prompt_template": reference + one})
            prompts.append({"name": pair, "system_prompt": f"Compare: {pair}", "prompt_template": reference + two})
    return [{**prompt, "type": "x", "description": "x", "output_format": "x"} for prompt in prompts]


def write_lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_files(folder: Path) -> tuple[str, str]:
    """Write questions and judge prompts, and return their paths."""
    return write_lines(folder / "question.jsonl", QUESTIONS), write_lines(
        folder / "judge_prompts.jsonl", judge_prompts()
    )
