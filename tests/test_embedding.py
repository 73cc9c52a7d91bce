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
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset
from minihub import MiniHub

from trl_bpo.breadth import BreadthSelector
from trl_bpo.embedding import embed_texts, encoder_fingerprint, require_sentence_transformers


TEXTS = ["What is the capital of France?", "Which city is the capital of France?", "Sort a list in Python.", ""]


def test_embeddings_have_unit_length(encoder):
    embeddings, cut = embed_texts(TEXTS, encoder)
    assert embeddings.shape == (4, 384) and embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1.0, rtol=1e-5)
    assert cut == [False] * 4


def test_texts_of_one_meaning_are_near(encoder):
    embeddings, _ = embed_texts(TEXTS, encoder)
    same, other = embeddings[0] @ embeddings[1], embeddings[0] @ embeddings[2]
    assert same > 0.8 > 0.4 > other


def test_neither_order_nor_batch_matter(encoder):
    embeddings, _ = embed_texts(TEXTS, encoder)
    for batch_size in (1, 3):
        again, _ = embed_texts(TEXTS[::-1], encoder, batch_size=batch_size)
        np.testing.assert_allclose(again[::-1], embeddings, atol=1e-5)


def test_long_texts_are_embedded_by_their_last_tokens(encoder):
    question = "What is the capital of France? " * 60
    embeddings, cut = embed_texts([f"{'red ' * 300}{question}", f"{'sea ' * 400}{question}", question[:100]], encoder)
    assert cut == [True, True, False]
    np.testing.assert_allclose(embeddings[0], embeddings[1], atol=1e-5)
    # Without the beginning they still read like the question.
    assert embeddings[0] @ embeddings[2] > 0.8


def test_an_encoder_that_was_exchanged_is_loaded_again(encoder, tmp_path):
    folder = tmp_path / "encoder"
    shutil.copytree(encoder, folder)
    Dataset.from_dict({"prompt": [f"{text} {number}" for number, text in enumerate(TEXTS * 3)]}).save_to_disk(
        tmp_path / "prompts"
    )
    # On the disk, so that the embeddings are in the cache.
    prompts = Dataset.load_from_disk(tmp_path / "prompts")

    def distances():
        return BreadthSelector(0.5, str(folder), n_clusters=2).select(prompts).dataset["breadth_distance"][:]

    content, before = encoder_fingerprint(str(folder)), distances()
    assert encoder_fingerprint(encoder) == content and distances() == before
    # One text is one vector, made of its tokens in another way.
    (pooling,) = folder.glob("*Pooling/config.json")
    config = json.loads(pooling.read_text())
    swapped = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    pooling.write_text(json.dumps({**config, **swapped}))
    assert encoder_fingerprint(str(folder)) != content
    assert np.abs(np.subtract(distances(), before)).max() > 0.01


FINGERPRINTS = """
from huggingface_hub import HfApi
from trl_bpo.embedding import encoder_fingerprint

api, seen = HfApi(), []
api.create_repo("tester/encoder")
for content in (b"{}", b"[]"):
    commit = api.upload_file(path_or_fileobj=content, path_in_repo="config.json", repo_id="tester/encoder").oid
    assert encoder_fingerprint("tester/encoder") == commit, commit
    seen.append(commit)
assert len(set(seen)) == 2
assert encoder_fingerprint("some-name") is None
"""


def test_an_encoder_of_the_hub_goes_by_its_commit(tmp_path):
    with MiniHub(tokens={"hf_tester": "tester"}) as hub:
        env = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_tester",
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
        }
        subprocess.run([sys.executable, "-c", FINGERPRINTS], env=env, check=True)


def test_what_is_missing_is_said(monkeypatch):
    require_sentence_transformers("`BreadthSelector`")
    # What Python itself does for a package that cannot be imported.
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"`depth_strategy='embedding'` requires .* 'trl_bpo\[embeddings\]'"):
        require_sentence_transformers("`depth_strategy='embedding'`")
