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


"""
The smallest task of our own on which a comparison of data has power: a policy of about a million parameters, trained from
nothing in minutes on two cores, and instructions whose fulfilment a program grades.

A prompt asks for a list of words of a topic, in a form: "List animals. Use exactly 3 bullet points. Include "owl"." The
policy is pre-trained (SFT) on demonstrations that honour each instruction only now and then, so that it knows how and does
not always do it: what preference optimization is for. Each row names the family of its instruction in the column `source`.

Families are far from equally frequent in the prompts to train on, as in real sets, and equally frequent in the prompts to
evaluate on; four families occur in no prompt to train preferences on.
"""

import json
import random
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from trl_bpo.splits import normalize_prompt


TOPICS = {
    "animals": "owl fox bear wolf deer hare mole crow swan seal lynx goat",
    "fruits": "apple pear plum fig grape lemon mango melon cherry peach lime kiwi",
    "colours": "red blue green black white pink brown grey violet amber teal ivory",
    "tools": "hammer saw drill file clamp chisel wrench pliers spade rake axe level",
    "cities": "oslo rome paris cairo lima quito delhi seoul tokyo bern riga doha",
    "clothes": "shirt coat scarf glove boot belt dress hat sock skirt vest shoe",
    "instruments": "harp flute drum violin cello organ guitar horn oboe banjo lute piano",
    "trees": "oak elm ash birch maple cedar willow larch beech alder poplar spruce",
    "metals": "iron zinc gold silver copper lead nickel cobalt chrome bronze brass steel",
    "spices": "salt pepper cumin mint basil thyme saffron ginger clove dill sage anise",
    "sports": "rugby golf tennis judo rowing fencing skiing chess boxing polo surfing hockey",
    "weather": "rain snow fog hail storm frost wind cloud sun thunder mist breeze",
}
HELD_OUT = ("ends_with", "numbered_list", "postscript", "uppercase")
# The most frequent family of the training prompts first; its share falls with the rank, as one over it.
TRAINED = (
    *("word_count", "required_words", "bullet_list", "forbidden_words", "quoted", "starts_with", "sentence_count"),
    *("title", "json_object", "placeholders", "answer_line", "paragraph_count"),
)
# An instruction about words goes together with one about form.
_WORDY = ("required_words", "forbidden_words")
_COMBINED = (
    *(
        "bullet_list",
        "numbered_list",
        "sentence_count",
        "paragraph_count",
        "postscript",
        "uppercase",
        "quoted",
        "title",
    ),
    *("placeholders", "answer_line"),
)
_ASKS = (
    *(
        "List {}.",
        "Name some {}.",
        "Give me {}.",
        "Which {} do you know?",
        "I need {}.",
        "Tell me {}.",
        "Write down {}.",
    ),
    "What {} are there?",
)
_HONOURED = 0.5


def _instruction(kind: str, topic: str, rng: random.Random) -> tuple[str, dict[str, Any]]:
    words = TOPICS[topic].split()
    if kind == "word_count":
        count = rng.randint(2, 9)
        return f"Use exactly {count} words.", {"min": count, "max": count}
    if kind in ("required_words", "forbidden_words", "json_object"):
        chosen = rng.sample(words, rng.randint(1, 3))
        text = " and ".join(f'"{word}"' for word in chosen)
        if kind == "json_object":
            return f"Answer with a JSON object with the keys {text}.", {"keys": chosen}
        return ("Include " if kind == "required_words" else "Leave out ") + text + ".", {"words": chosen}
    if kind in ("starts_with", "ends_with"):
        text = " ".join(rng.sample(words, 2))
        return f'{"Begin" if kind == "starts_with" else "End"} with "{text}".', {"text": text}
    if kind in ("bullet_list", "numbered_list", "sentence_count", "paragraph_count", "placeholders"):
        count = rng.randint(2, 5)
        what = {
            "bullet_list": "Use exactly {} bullet points.",
            "numbered_list": "Number them from 1 to {}.",
            "sentence_count": "Write exactly {} sentences.",
            "paragraph_count": "Write exactly {} paragraphs.",
            "placeholders": "Leave {} placeholders in square brackets.",
        }[kind]
        exact = {"min": count, "max": count} if kind == "sentence_count" else {"count": count}
        return what.format(count), exact
    if kind == "answer_line":
        word = rng.choice(words)
        return f'End with a line "Answer:" and {word}.', {"answer": word}
    return {
        "quoted": "Put it all in double quotes.",
        "title": "Put a title in << and >> first.",
        "postscript": "Add a postscript.",
        "uppercase": "Use capital letters only.",
    }[kind], {}


def _prompt(kind: str, rng: random.Random) -> dict[str, Any]:
    topic = rng.choice(list(TOPICS))
    kinds = [kind]
    if kind in _COMBINED and rng.random() < 0.8:
        kinds.append(rng.choice(_WORDY))
    parts, constraints = [rng.choice(_ASKS).format(topic)], []
    for each in kinds:
        text, args = _instruction(each, topic, rng)
        parts.append(text)
        constraints.append({"kind": each, "args": json.dumps(args)})
    return {
        "prompt": [{"role": "user", "content": " ".join(parts)}],
        "constraints": constraints,
        "source": kind,
        "topic": topic,
        "seen": kind in TRAINED,
    }


def _demonstration(row: dict[str, Any], rng: random.Random) -> str:
    words = TOPICS[row["topic"]].split()
    rng.shuffle(words)
    # Each instruction is honoured or not; what is not is what someone would write who had not read it.
    wanted = {item["kind"]: json.loads(item["args"]) for item in row["constraints"] if rng.random() < _HONOURED}
    kind = row["source"]
    count = rng.randint(2, 9)
    if kind in wanted:
        count = wanted[kind].get("count") or wanted[kind].get("min") or count
    if "forbidden_words" in wanted:
        words = [word for word in words if word not in wanted["forbidden_words"]["words"]]
    else:
        named = [word for item in row["constraints"] for word in json.loads(item["args"]).get("words", [])]
        if named and rng.random() < 0.5:
            words.insert(0, words.pop(words.index(named[0])))
    listed = kind in wanted and kind in ("bullet_list", "numbered_list", "sentence_count", "paragraph_count")
    if listed:
        groups = [[words[index]] for index in range(count)]
        if kind in ("sentence_count", "paragraph_count"):
            for word in words[count : count + rng.randint(0, len(words) - count)]:
                rng.choice(groups).append(word)
    else:
        groups = [words[:count]]
    flat = [word for group in groups for word in group]
    for word in wanted.get("required_words", {}).get("words", []):
        if word not in flat:
            group = rng.choice(groups)
            group[rng.randrange(len(group))] = word
    texts = [" ".join(group) for group in groups]
    if kind not in wanted:
        return texts[0]
    if kind == "bullet_list":
        return "\n".join(f"- {text}" for text in texts)
    if kind == "numbered_list":
        return "\n".join(f"{number}. {text}" for number, text in enumerate(texts, start=1))
    if kind == "sentence_count":
        return " ".join(f"{text}." for text in texts)
    if kind == "paragraph_count":
        return "\n\n".join(texts)
    text, args = texts[0], wanted[kind]
    if kind in ("starts_with", "ends_with"):
        rest = " ".join(word for word in text.split() if word not in args["text"].split())
        return f"{args['text']} {rest}".strip() if kind == "starts_with" else f"{rest} {args['text']}".strip()
    return {
        "quoted": f'"{text}"',
        "title": f"<<{row['topic']}>> {text}",
        "json_object": "{" + ", ".join(f'"{key}": {n}' for n, key in enumerate(args.get("keys", []), start=1)) + "}",
        "placeholders": " ".join(f"[{word}]" for word in words[:count]),
        "answer_line": f"{text}\nAnswer: {args.get('answer')}",
        "postscript": f"{text}\nP.S. {rng.choice(words)}",
        "uppercase": text.upper(),
    }.get(kind, text)


def make_prompts(
    num_prompts: int, kinds: tuple[str, ...], zipf: bool, seed: int, without: Collection[str] = ()
) -> Dataset:
    """
    Draw distinct prompts.

    Args:
        num_prompts (`int`):
            Number of prompts.
        kinds (`tuple[str, ...]`):
            Families to draw from.
        zipf (`bool`):
            Whether the frequency of a family falls with its rank in `kinds`, as one over it. Otherwise all are alike.
        seed (`int`):
            Seed.
        without (`Collection[str]`, *optional*):
            Prompts, as [`~trl_bpo.splits.normalize_prompt`] writes them, that are not drawn.

    Returns:
        [`~datasets.Dataset`]: Columns `prompt` (conversational), `constraints` as [`~trl_bpo.VerifiableJudge`] takes
        them, `source` (the family), `topic`, and `seen`, whether preferences are trained on the family.
    """
    rng = random.Random(seed)
    weights = [1 / rank if zipf else 1 for rank in range(1, len(kinds) + 1)]
    rows: dict[str, dict] = {}
    while len(rows) < num_prompts:
        row = _prompt(rng.choices(kinds, weights)[0], rng)
        text = normalize_prompt(row["prompt"])
        if text not in without:
            rows.setdefault(text, row)
    return Dataset.from_list(list(rows.values()))


def make_demonstrations(num_prompts: int, seed: int, without: Collection[str] = ()) -> Dataset:
    """
    Draw prompts of all families, equally often, with a demonstration each, of mixed quality. Prompts may come again.

    Args:
        num_prompts (`int`):
            Number of demonstrations.
        seed (`int`):
            Seed.
        without (`Collection[str]`, *optional*):
            Prompts, as [`~trl_bpo.splits.normalize_prompt`] writes them, that are not drawn.

    Returns:
        [`~datasets.Dataset`]: Columns as those of [`make_prompts`], and `completion`, one message.
    """
    rng = random.Random(seed)
    rows: list[dict] = []
    while len(rows) < num_prompts:
        row = _prompt(rng.choice((*TRAINED, *HELD_OUT)), rng)
        if normalize_prompt(row["prompt"]) not in without:
            completion = [{"role": "assistant", "content": _demonstration(row, rng)}]
            rows.append({**row, "completion": completion})
    return Dataset.from_list(rows)


_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _train_tokenizer(demonstrations: Dataset) -> PreTrainedTokenizerFast:
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [row["prompt"][0]["content"] + "\n" + row["completion"][0]["content"] for row in demonstrations]
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=_CHAT_TEMPLATE,
        model_max_length=256,
        padding_side="left",
    )


def build_policy(path: str | Path, demonstrations: Dataset, seed: int = 0) -> str:
    """
    Train the policy from nothing: a tokenizer, and a Llama of about a million parameters by SFT on the demonstrations.

    Args:
        path (`str` or `Path`):
            Folder to write. One that holds the policy is left as it is. It appears whole or not at all.
        demonstrations ([`~datasets.Dataset`]):
            Those of [`make_demonstrations`].
        seed (`int`, *optional*, defaults to `0`):
            Seed of weights and order.

    Returns:
        `str`: `path`, to load with `from_pretrained`.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        return str(path)
    staging = path.with_name(f"{path.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    set_seed(seed)
    tokenizer = _train_tokenizer(demonstrations)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    args = SFTConfig(
        str(staging),
        num_train_epochs=2,
        per_device_train_batch_size=32,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        max_length=256,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        seed=seed,
    )
    trainer = SFTTrainer(
        LlamaForCausalLM(config),
        args,
        train_dataset=demonstrations.select_columns(["prompt", "completion"]),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.model.config._name_or_path = path.name
    trainer.save_model(str(staging))
    tokenizer.save_pretrained(staging)
    staging.rename(path)
    return str(path)
