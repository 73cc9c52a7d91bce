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


import hashlib

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from trl_bpo.ids import dense_ranks, id_at, id_column, read_column
from trl_bpo.manifest import sha256_of_ids


IDS = ["b", "a", "é", "B", "a", "", "aa", "z" * 70]


@pytest.mark.parametrize(
    "ids", [IDS, pa.array(IDS), pa.chunked_array([IDS[:3], IDS[3:]]), pa.array(IDS, pa.large_string())]
)
def test_ranks_are_those_of_python(ids):
    distinct = sorted(set(IDS))
    assert dense_ranks(ids).tolist() == [distinct.index(one) for one in IDS]
    assert dense_ranks(ids).dtype == np.int64
    assert [id_at(ids, row) for row in range(len(IDS))] == IDS


def test_numbers_are_ranks_already():
    numbers = np.asarray([5, 3, 5])
    assert dense_ranks(numbers) is numbers


def test_column_of_chosen_rows():
    dataset = Dataset.from_dict({"id": [7, 8, 9], "x": [1, 2, 3]}).select([2, 0])
    assert read_column(dataset, "x").to_pylist() == [3, 1]
    assert id_column(dataset, "id").to_pylist() == ["9", "7"]


@pytest.mark.parametrize("chunks", [[IDS], [IDS[:3], [], IDS[3:]], [[]]])
def test_digest_of_a_column(chunks):
    column = pa.chunked_array(chunks, pa.string())
    texts = [one for chunk in chunks for one in chunk]
    assert sha256_of_ids(column) == sha256_of_ids(texts) == hashlib.sha256("".join(texts).encode()).hexdigest()
    # A slice begins within the text of its chunk.
    assert sha256_of_ids(column[1:]) == sha256_of_ids(texts[1:])
