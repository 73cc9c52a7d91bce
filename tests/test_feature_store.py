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


import os
import subprocess
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from trl_bpo import feature_store
from trl_bpo.feature_store import FeatureStore, StoreMismatchError, rows_hash, tensors_hash
from trl_bpo.pair_features import StoredPairs


N, DIM = 60, 40
HEADER = {"model": "abc", "rows": "def", "seed": 42, "gradient_layers": None, "loss_type": ("ipo",)}
RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(N, DIM)).astype(np.float32)
LOGPS = RNG.normal(size=N)


@pytest.fixture(autouse=True)
def each_write_counts(monkeypatch):
    # Written features are on the disk at once, and not only after some seconds.
    monkeypatch.setattr(feature_store, "_FLUSH_SECONDS", -1.0)


def make(folder, header=None, n_rows=N, dim=DIM, scalars=("logp",), **kwargs):
    return FeatureStore(folder, HEADER if header is None else header, n_rows, dim, scalars=scalars, **kwargs)


def fill(store, rows, features=FEATURES):
    """In batches of seven, as a pass does."""
    rows = list(rows)
    for start in range(0, len(rows), 7):
        batch = rows[start : start + 7]
        store.write(batch, features[batch], logp=LOGPS[batch])


def assert_holds(store, rows, features=FEATURES):
    rows = np.asarray(sorted(rows), dtype=int)
    assert np.array_equal(np.flatnonzero(store.done), rows)
    assert np.array_equal(store.read(rows), features[rows])
    expected = np.zeros(N)
    expected[rows] = LOGPS[rows]
    assert np.array_equal(store.scalar("logp"), expected)


# Write, close, take up again


def test_rows_in_any_order_are_there_after_closing(tmp_path):
    order = RNG.permutation(N)
    store = make(tmp_path)
    assert not store.done.any() and store.read([]).shape == (0, DIM)
    fill(store, order[:40])
    assert_holds(store, order[:40])
    store.close()
    store = make(tmp_path)
    assert_holds(store, order[:40])
    fill(store, order[40:])
    store.close()
    assert_holds(make(tmp_path), range(N))
    # In the order that is asked for, and as often.
    assert np.array_equal(make(tmp_path).read([5, 3, 5]), FEATURES[[5, 3, 5]])


def test_what_was_not_forced_to_the_disk_is_not_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store, "_FLUSH_SECONDS", 1e9)
    store = make(tmp_path)
    fill(store, range(20))
    assert not store.done.any() and not make(tmp_path, part=1).done.any()
    store.flush()
    assert_holds(store, range(20))
    fill(store, range(20, 30))
    store.close()
    assert_holds(make(tmp_path), range(30))


def test_float16_is_within_its_documented_error(tmp_path):
    # Norms that float16 does not have, and within a row entries of very different size.
    features = FEATURES * np.logspace(-12, 12, N, dtype=np.float32)[:, None]
    features[:, 0] *= 1e-6
    features[7] = 0.0
    store = make(tmp_path, dtype="float16")
    fill(store, range(N), features)
    store.close()
    read = make(tmp_path, dtype="float16").read(range(N))
    assert read.dtype == np.float32
    largest = np.abs(features).max(axis=1, keepdims=True)
    error = np.abs(read.astype(np.float64) - features)
    # The scale is kept in float32, which adds a rounding of its own.
    assert (error <= 1.001 * np.maximum(0.0005 * np.abs(features), 3e-8 * largest)).all()
    assert (read[7] == 0).all() and error.max() > 0
    assert (tmp_path / "part-00000.features").stat().st_size == 2 * N * DIM


def test_float64_is_kept_to_the_bit(tmp_path):
    features = np.random.default_rng(1).normal(size=(N, DIM))
    store = make(tmp_path, dtype="float64")
    fill(store, range(N), features)
    assert store.read([0]).dtype == np.float64
    assert_holds(make(tmp_path, dtype="float64"), range(N), features)


def test_scalars_alone(tmp_path):
    store = make(tmp_path, dim=0, scalars=("chosen", "rejected"))
    store.write([4, 2], np.empty((2, 0)), chosen=np.array([1.5, np.pi]), rejected=np.array([-1.0, 1e-300]))
    store.close()
    store = make(tmp_path, dim=0, scalars=("chosen", "rejected"))
    assert np.flatnonzero(store.done).tolist() == [2, 4]
    assert store.scalar("chosen")[[2, 4]].tolist() == [np.pi, 1.5] and store.scalar("rejected")[2] == 1e-300
    assert store.read([2, 4]).shape == (2, 0)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so_in_its_row_alone(tmp_path, dtype, value):
    features = FEATURES.copy()
    features[3, 5] = value
    store = make(tmp_path, dtype=dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        fill(store, range(N), features)
        read = store.read(range(N))
    finite = np.isfinite(read).all(axis=1)
    assert not finite[3] and finite.sum() == N - 1


# What a killed process leaves behind


def torn(folder, features=0, rows=0):
    """Cut bytes off the end of the files, or add some."""
    for suffix, change in ((".features", features), (".rows", rows)):
        path = folder / f"part-00000{suffix}"
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.truncate(size + min(change, 0))
            file.seek(0, os.SEEK_END)
            file.write(b"\xff" * max(change, 0))


# A record is a row, a scale and one scalar: 20 bytes. Features of one row are 160.
@pytest.mark.parametrize(
    ("features", "rows", "kept"),
    [
        pytest.param(7 * 160, 0, 21, id="features of a batch without their records"),
        pytest.param(100, 0, 21, id="part of the features of a row"),
        pytest.param(-100, 0, 20, id="a record without all of its features"),
        pytest.param(-7 * 160, 0, 14, id="records without features"),
        pytest.param(0, -5, 20, id="a part of a record"),
        pytest.param(160, 13, 21, id="features, and a part of their record"),
        pytest.param(-21 * 160, 0, 0, id="no features at all"),
        pytest.param(0, -21 * 20, 0, id="no record at all"),
    ],
)
def test_a_torn_tail_is_dropped_and_the_rest_kept(tmp_path, features, rows, kept):
    order = RNG.permutation(N)
    store = make(tmp_path)
    fill(store, order[:21])
    store.close()
    torn(tmp_path, features, rows)
    store = make(tmp_path)
    assert_holds(store, order[:kept])
    # What comes next lies where it is looked for.
    fill(store, order[kept:])
    store.close()
    assert_holds(make(tmp_path), range(N))


def test_killed_before_the_first_row(tmp_path):
    make(tmp_path).close()
    for suffixes in ((".rows",), (".rows", ".features")):
        for suffix in suffixes:
            (tmp_path / f"part-00000{suffix}").unlink()
        store = make(tmp_path)
        assert not store.done.any()
        fill(store, range(3))
        assert_holds(store, range(3))
        store.close()


# Of something else


@pytest.mark.parametrize(
    ("change", "differing", "said"),
    [
        ({"header": {**HEADER, "model": "xyz"}}, ["model"], "model 'abc' there, 'xyz' now"),
        ({"header": {**HEADER, "rows": "xyz"}}, ["rows"], "rows 'def' there, 'xyz' now"),
        ({"header": {**HEADER, "seed": 1}}, ["seed"], "seed 42 there, 1 now"),
        ({"header": {**HEADER, "gradient_layers": [1]}}, ["gradient_layers"], r"None there, \[1\] now"),
        ({"header": {**HEADER, "beta": 0.1}}, ["beta"], "beta None there, 0.1 now"),
        ({"header": {}}, ["model", "rows", "seed", "loss_type"], "model 'abc' there, None now"),
        ({"n_rows": N + 1}, ["n_rows"], "n_rows 60 there, 61 now"),
        ({"dim": 8}, ["dim"], "dim 40 there, 8 now"),
        ({"dtype": "float16"}, ["dtype"], "dtype 'float32' there, 'float16' now"),
        ({"scalars": ()}, ["scalars"], r"scalars \['logp'\] there, \[\] now"),
        ({"header": {**HEADER, "seed": 1}, "dim": 8}, ["dim", "seed"], "dim 40 there, 8 now; seed 42 there, 1 now"),
    ],
)
def test_features_of_something_else_are_refused_and_left(tmp_path, change, differing, said):
    store = make(tmp_path)
    fill(store, range(9))
    store.close()
    for part in (0, 1):  # also where another process wrote them
        with pytest.raises(StoreMismatchError, match=said) as raised:
            make(tmp_path, **change, part=part)
        assert raised.value.differing == differing
        assert str(tmp_path) in str(raised.value) and "delete that folder" in str(raised.value)
    assert_holds(make(tmp_path), range(9))


def test_the_header_is_as_json_gives_it_back(tmp_path):
    make(tmp_path, {**HEADER, "loss_type": ("ipo", "sft")}).close()
    make(tmp_path, {**HEADER, "loss_type": ["ipo", "sft"]}).close()


def test_hashes_tell_apart():
    weight = torch.arange(12, dtype=torch.float32).view(3, 4)
    base = tensors_hash([("a", weight)])
    assert base == tensors_hash([("a", weight.clone())]) == tensors_hash([("a", weight.T.contiguous().T)])
    changed = weight.clone()
    changed[1, 2] = torch.nextafter(changed[1, 2], torch.tensor(7.0))
    others = [
        [("b", weight)],
        [("a", weight.T)],
        [("a", changed)],
        [("a", weight.half())],
        [("a", weight.view(12))],
        [],
    ]
    hashes = {base, *(tensors_hash(other) for other in others)}
    assert len(hashes) == 7
    for dtype in (torch.bfloat16, torch.float64, torch.uint8, torch.int8, torch.bool):
        hashes.add(tensors_hash([("a", weight.to(dtype))]))
    assert len(hashes) == 12
    # Under ZeRO-3 a parameter is empty, and its part of the weights an attribute.
    for part in (weight, changed):
        parameter = torch.empty(0)
        parameter.ds_tensor = part
        hashes.add(tensors_hash([("a", parameter)]))
    assert len(hashes) == 14
    # Where one row ends and the next begins counts.
    assert len({rows_hash([(1, 2), (3,)]), rows_hash([(1,), (2, 3)]), rows_hash([(3,), (1, 2)]), rows_hash([])}) == 4


# Several processes


def test_parts_in_one_folder_are_put_together(tmp_path):
    stores = [make(tmp_path, part=part) for part in range(3)]
    for part, store in enumerate(stores):
        fill(store, range(part, N, 3))
    for store in stores:
        store.read_other_parts()
        assert_holds(store, range(N))
        store.close()
    assert len(list(tmp_path.glob("*.features"))) == 3
    # Another number of processes goes on from all that is there.
    assert_holds(make(tmp_path), range(N))
    assert_holds(make(tmp_path, part=5), range(N))


def test_rows_that_another_process_adds_later_are_found(tmp_path):
    first, second = make(tmp_path), make(tmp_path, part=1)
    fill(second, range(7))
    first.read_other_parts()
    assert_holds(first, range(7))
    fill(second, range(7, 14))
    fill(first, range(14, 21))
    first.read_other_parts()
    assert_holds(first, range(21))


def test_a_row_in_two_parts_counts_once(tmp_path):
    first, second = make(tmp_path), make(tmp_path, part=1)
    fill(first, range(40))
    fill(second, range(20, N))
    for store in (first, second):
        store.read_other_parts()
        assert_holds(store, range(N))
    # The own one may come after that of another as well.
    fill(first, range(N))
    assert_holds(first, range(N))
    first.close()
    assert_holds(make(tmp_path), range(N))


def test_a_torn_tail_of_another_part_is_not_taken(tmp_path):
    store = make(tmp_path)
    fill(store, range(21))
    store.close()
    torn(tmp_path, features=-100, rows=7)
    assert_holds(make(tmp_path, part=1), range(20))


# A full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with room for 96 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs `mount`")
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


BIG = np.random.default_rng(2).normal(size=(N, 256)).astype(np.float32)  # 60 kB


@pytest.mark.parametrize("flush_seconds", [-1.0, 1e9])
def test_a_full_disk_is_one_clear_error_and_the_store_goes_on(small_disk, monkeypatch, flush_seconds):
    monkeypatch.setattr(feature_store, "_FLUSH_SECONDS", flush_seconds)
    folder = small_disk / "store"
    store = make(folder, dim=256)
    fill(store, range(14), BIG)
    store.flush()
    (small_disk / "other").write_bytes(b"x" * 50_000)
    with pytest.raises(OSError, match="No space left on device: the gradient features cannot be written") as raised:
        fill(store, range(14, N), BIG)
    n_done = int(store.done.sum())
    assert 14 <= n_done < N and n_done % 7 == 0
    assert str(folder) in str(raised.value) and f"holds {n_done} of 60 rows" in str(raised.value)
    assert "Make room there and start again" in str(raised.value)
    assert_holds(store, range(n_done), BIG)
    # Nothing is left to fail at: a second error would hide the first.
    store.close()

    with pytest.raises(OSError, match=r"need 0\.00 GB more in .*where 0\.00 GB are free.*`projection_dim`"):
        make(folder, dim=256)
    (small_disk / "other").unlink()
    store = make(folder, dim=256)
    assert_holds(store, range(n_done), BIG)
    fill(store, range(n_done, N), BIG)
    store.close()
    assert_holds(make(folder, dim=256), range(N), BIG)


def test_a_disk_that_is_full_when_records_are_written(small_disk, monkeypatch):
    # With hardly any features the records fill the disk, in the middle of one of them.
    monkeypatch.setattr(feature_store, "_FLUSH_SECONDS", 1e9)
    n_rows = 3000
    store = make(small_disk, n_rows=n_rows, dim=1)
    (small_disk / "other").write_bytes(b"x" * 40_000)
    features, logps = np.arange(n_rows, dtype=np.float32)[:, None], np.arange(n_rows) * 0.5
    store.write(range(100), features[:100], logp=logps[:100])
    store.flush()
    store.write(range(100, n_rows), features[100:], logp=logps[100:])
    with pytest.raises(OSError, match="which holds 100 of 3000 rows"):
        store.flush()
    # The same store goes on, too: nothing of the failed write is left in its files.
    (small_disk / "other").unlink()
    store.write(range(100, 2000), features[100:2000], logp=logps[100:2000])
    store.close()
    store = make(small_disk, n_rows=n_rows, dim=1)
    assert np.array_equal(np.flatnonzero(store.done), np.arange(2000))
    assert np.array_equal(store.read(range(2000)), features[:2000])
    assert np.array_equal(store.scalar("logp")[:2000], logps[:2000])


def test_too_small_a_disk_is_refused_before_anything_is_computed(small_disk):
    with pytest.raises(
        OSError,
        match="Free space; or delete that folder, and lower `projection_dim` or set `gradient_dtype='float16'`",
    ):
        make(small_disk / "store", dim=1000)
    assert list((small_disk / "store").iterdir()) == []
    make(small_disk / "store", dim=1000, dtype="float64", n_rows=1).close()
    # Rows that are there need no more room, whoever wrote them.
    fill(make(small_disk / "other", dim=256), range(N), BIG)
    (small_disk / "filler").write_bytes(b"x" * 8_000)
    for part in (0, 1):
        assert_holds(make(small_disk / "other", dim=256, part=part), range(N), BIG)


# Memory


def test_memory_is_that_of_what_is_asked_for(tmp_path):
    n_rows, dim, rows = 6000, 1024, 250  # 25 MB in all
    chunk = np.ones((rows, dim), dtype=np.float32)
    tracemalloc.start()
    try:
        store = FeatureStore(tmp_path, {}, n_rows, dim)
        for start in range(0, n_rows, rows):
            store.write(range(start, start + rows), chunk * start)
        store.close()
        store = FeatureStore(tmp_path, {}, n_rows, dim)
        total = sum(float(store.read(range(i, i + rows))[:, 0].sum()) for i in range(0, n_rows, rows))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total == rows * sum(range(0, n_rows, rows))
    # A few copies of a part, and 30 bytes a row.
    assert peak < 5 * chunk.nbytes
    # Pages of a mapped file count as the process's own, where memory is limited.
    assert ".features" not in Path("/proc/self/maps").read_text()


def test_files_are_closed(tmp_path):
    n_open = len(os.listdir("/proc/self/fd"))
    make(tmp_path, part=1).close()
    for _ in range(5):
        store = make(tmp_path)
        fill(store, range(7))
        store.read([1])
        store.close()
    with pytest.raises(StoreMismatchError):
        make(tmp_path, {})
    assert len(os.listdir("/proc/self/fd")) == n_open


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_features_of_pairs_are_put_together(tmp_path, dtype):
    store = make(tmp_path, dtype=dtype)
    fill(store, range(N))
    assert store.read([]).shape == (0, DIM)
    pairs = np.asarray([[0, 1], [1, 0], [5, 5], [58, 59]])
    coefficients = np.asarray([[-1.0, 1.0], [0.5, 0.0], [2.0, -2.0], [1.0, 1.0]])
    expected = sum(coefficients[:, [side]] * FEATURES[pairs[:, side]] for side in range(2))
    features = StoredPairs(store, pairs, coefficients)[:]
    assert features.dtype == np.float32 and not features[2].any()
    assert np.allclose(features, expected, atol=0 if dtype == "float32" else 5e-3, rtol=1e-6)
    store.close()


def test_a_store_without_a_row_gives_way(tmp_path):
    # As one whose first batch did not fit into memory, and whose options were then changed.
    make(tmp_path).close()
    store = make(tmp_path, header={**HEADER, "seed": 43})
    fill(store, range(8))
    store.close()
    with pytest.raises(StoreMismatchError, match="seed 43 there, 42 now"):
        make(tmp_path)


def test_only_the_rows_that_will_be_written_need_room(small_disk):
    row = DIM * 4 + 20
    n_rows = 2 * os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize // row
    with pytest.raises(OSError, match="Free space"):
        make(small_disk / "all", n_rows=n_rows)
    make(small_disk / "some", n_rows=n_rows, n_needed=n_rows // 4).close()
