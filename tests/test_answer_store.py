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


import multiprocessing
import os
import random
import resource
import signal
import time

import pytest

from trl_bpo.answer_store import AnswerStore, content_key, prepare_folder


def key(number):
    return content_key(["request", number])


def answer(number):
    # Texts of all kinds: what ends a line to other readers, what looks like a line of the store, and none at all.
    kinds = [
        "plain",
        "two\nlines",
        "\u2028\u0085\x00",
        '{"keys":["' + "0" * 32 + '"],"answers":[{}]}\n',
        "é€😀\ud800",
        "",
    ]
    return {"text": kinds[number % len(kinds)] * (1 + number % 3), "number": number, "logprobs": [["7", None, []]]}


def in_a_process(function, *arguments):
    """Run a function in a process of its own, and give what it returns."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def test_answers_are_found_again(tmp_path):
    folder = tmp_path / "below" / "folder"
    store = AnswerStore(folder)
    assert not folder.exists() and key(0) not in store and store.get(key(0)) is None
    for number in range(50):
        store.put(key(number), answer(number))
        assert store.get(key(number // 2)) == answer(number // 2)
    assert len(store) == 50 and key(50) not in store
    store.close()
    for opened in (store, AnswerStore(str(folder))):
        assert [opened.get(key(number)) for number in range(51)] == [answer(number) for number in range(50)] + [None]
        assert len(opened) == 50 and key(49) in opened


def test_key_depends_on_the_content_alone():
    assert content_key({"a": 1, "b": ["é"]}) == content_key({"b": ["é"], "a": 1})
    keys = {
        content_key(content) for content in ({"a": 1}, {"a": "1"}, {"a": 1.5}, {"a": None}, ["a", 1], "a", 1, None)
    }
    assert len(keys) == 8 and all(len(one) == 32 for one in keys)


def test_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = AnswerStore(None)
    store.put_many([(key(0), answer(0)), (key(1), answer(1)), (key(0), answer(2))])
    assert [store.get(key(number)) for number in range(3)] == [answer(0), answer(1), None]
    assert len(store) == 2 and key(1) in store and key(2) not in store
    store.close()
    assert store.get(key(1)) == answer(1) and not list(tmp_path.iterdir())


def test_the_first_answer_counts(tmp_path):
    store = AnswerStore(tmp_path)
    store.put_many([(key(0), answer(0)), (key(0), answer(1))])
    store.put(key(0), answer(2))
    assert store.get(key(0)) == answer(0) and len(store) == 1
    store.close()
    assert AnswerStore(tmp_path).get(key(0)) == answer(0)


def test_close_and_go_on(tmp_path):
    store = AnswerStore(tmp_path)
    for number in range(6):
        store.put_many([(key(2 * number), answer(2 * number)), (key(2 * number + 1), answer(2 * number + 1))])
        store.close()
        store.close()
    assert len(list(tmp_path.iterdir())) == 6
    assert [store.get(key(number)) for number in range(12)] == [answer(number) for number in range(12)]
    assert [AnswerStore(tmp_path).get(key(number)) for number in range(12)] == [answer(number) for number in range(12)]


def test_last_line_torn_at_any_byte(tmp_path):
    store = AnswerStore(tmp_path)
    store.put_many([(key(number), answer(number)) for number in range(2)])
    store.put(key(2), answer(2))
    # What was put together is torn together.
    store.put_many([(key(3), answer(3)), (key(4), answer(4))])
    store.close()
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, len(whole) - 1) + 1
    for length in range(last, len(whole)):
        path.write_bytes(whole[:length])
        torn = AnswerStore(tmp_path)
        assert [torn.get(key(number)) for number in range(5)] == [*(answer(number) for number in range(3)), None, None]
        # It is asked for again, and the file stays as it was.
        torn.put(key(3), answer(9))
        torn.close()
        assert AnswerStore(tmp_path).get(key(3)) == answer(9) and path.read_bytes() == whole[:length]
        (repaired,) = (other for other in tmp_path.iterdir() if other != path)
        repaired.unlink()
    path.write_bytes(whole)
    assert AnswerStore(tmp_path).get(key(3)) == answer(3)


def test_a_line_that_another_process_finishes_later(tmp_path):
    writer = AnswerStore(tmp_path)
    writer.put_many([(key(number), answer(number)) for number in range(3)])
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    reader = AnswerStore(tmp_path)
    assert key(2) not in reader
    reader.put(key(5), answer(5))
    path.write_bytes(whole)
    reader.refresh()
    writer.put(key(3), answer(3))
    assert [reader.get(key(number)) for number in (0, 1, 2, 5)] == [answer(number) for number in (0, 1, 2, 5)]
    assert key(3) not in reader and key(5) not in writer
    for store in (reader, writer):
        store.refresh()
        assert [store.get(key(number)) for number in (0, 1, 2, 3, 5)] == [answer(n) for n in (0, 1, 2, 3, 5)]
        assert len(store) == 5
        store.close()


def find_with_few_files_open(folder, count):
    limit = len(os.listdir("/proc/self/fd")) + 4
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    store = AnswerStore(folder)
    return [store.get(key(number)) for number in range(count)]


def test_more_files_than_may_be_open(tmp_path):
    for number in range(40):
        store = AnswerStore(tmp_path)
        store.put(key(number), answer(number))
        store.close()
    assert in_a_process(find_with_few_files_open, tmp_path, 40) == [answer(number) for number in range(40)]


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "failed-judgements-00000.jsonl").write_text('{"row": 1}\n')
    (tmp_path / "notes.txt").write_bytes(b"\xff\x00")
    (tmp_path / "answers.jsonl").write_text("mine\n")
    (tmp_path / "folder").mkdir()
    store = AnswerStore(tmp_path)
    store.put(key(0), answer(0))
    store.close()
    assert len(AnswerStore(tmp_path)) == 1


@pytest.mark.parametrize(
    "content",
    [
        '{"row": 1}\n',
        '{"keys":["abc"],"answers":[{}]}\n',
        '{"keys":["' + "z" * 32 + '"],"answers":[{}]}\n',
        '{"keys":["' + "0" * 32 + '"],"texts":[{}]}\n',
    ],
)
def test_a_foreign_file_under_the_name_of_answers(tmp_path, content):
    (tmp_path / "answers-of-mine.jsonl").write_text(content)
    with pytest.raises(ValueError, match="answers-of-mine.jsonl` is no file of answers.*another folder"):
        AnswerStore(tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "answers-0.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(OSError, match="answers-0.jsonl"):
        AnswerStore(tmp_path)


def test_empty_file_of_a_process_that_was_killed_at_once(tmp_path):
    (tmp_path / "answers-00000-0.jsonl").touch()
    assert len(AnswerStore(tmp_path)) == 0


@pytest.mark.parametrize("below", ["", "folder"])
def test_folder_that_cannot_be_made(tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="`cache_dir` cannot be made"):
        prepare_folder(tmp_path / "file" / below)


def fill_up(folder):
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    store = AnswerStore(folder)
    number = 0
    with pytest.raises(OSError):
        while True:
            store.put(key(number), answer(number))
            number += 1
    assert key(number) not in store and len(store) == number
    # There is room again, as every file has its own limit here.
    store.put(key(number), answer(1000))
    assert store.get(key(number)) == answer(1000)
    assert all(store.get(key(n)) == answer(n) for n in range(number))
    store.put_many([(key(number + n), answer(number + n)) for n in range(1, 4)])
    store.refresh()
    store.close()
    assert len(store) == number + 4
    return number


def test_full_disk(tmp_path):
    # In a process of its own, whose files may not grow beyond 2,000 bytes.
    number = in_a_process(fill_up, tmp_path)
    assert number > 10
    # The torn line is there, and harms nobody.
    assert max(path.stat().st_size for path in tmp_path.iterdir()) == 2000
    store = AnswerStore(tmp_path)
    assert len(store) == number + 4 and store.get(key(number)) == answer(1000)
    assert all(store.get(key(n)) == answer(n) for n in range(number + 4) if n != number)


def write_range(folder, first, barrier):
    store = AnswerStore(folder)
    barrier.wait()
    for number in range(first, first + 1500):
        store.put(key(number), answer(number))


def test_two_processes_write_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    # A third of the answers is asked for by both.
    processes = [context.Process(target=write_range, args=(tmp_path, first, barrier)) for first in (0, 1000)]
    for process in processes:
        process.start()
    # Whoever reads meanwhile finds whole answers.
    reader = AnswerStore(tmp_path)
    while any(process.is_alive() for process in processes):
        reader.refresh()
        for number in range(0, 2500, 50):
            assert reader.get(key(number)) in (None, answer(number))
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(list(tmp_path.iterdir())) == 2
    reader.refresh()
    for store in (reader, AnswerStore(tmp_path)):
        assert len(store) == 2500
        assert all(store.get(key(number)) == answer(number) for number in range(2500))


def write_until_killed(folder, connection):
    store = AnswerStore(folder)
    number = len(store)
    while True:
        # Small and large, one by one and together. Once it is said, it counts.
        store.put(key(number), answer(number))
        connection.send_bytes(b"%d" % (number + 1))
        more = [(key(number + offset), answer(number + offset)) for offset in range(1, 1 + 20 * (number % 2))]
        store.put_many([*more, (key(number + len(more) + 1), answer(number + len(more) + 1))])
        number += len(more) + 2
        connection.send_bytes(b"%d" % number)


def test_kill_in_the_middle_of_writing(tmp_path):
    draw = random.Random(0)
    context = multiprocessing.get_context("fork")
    for kill in range(20):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=write_until_killed, args=(tmp_path, sender))
        process.start()
        sender.close()
        said = receiver.recv_bytes()
        deadline = time.monotonic() + draw.uniform(0.0, 0.03)
        while time.monotonic() < deadline:
            said = receiver.recv_bytes()
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        try:
            while True:
                said = receiver.recv_bytes()
        except EOFError:
            receiver.close()
        store = AnswerStore(tmp_path)
        assert len(store) >= int(said), kill
        assert all(store.get(key(number)) == answer(number) for number in range(len(store)))
        store.close()
