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
Answers on disk, so that none is asked for twice.

A paid or long computed answer is looked up by the content of its request. The files are append-only JSON lines, one file
for every process of every run: no file has two writers, so nothing needs a lock, and neither two runs on one folder nor a
network file system can corrupt them. A line that a kill tore is ignored when the files are read back.
"""

import hashlib
import io
import json
import logging
import os
import re
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate import PartialState


logger = logging.getLogger(__name__)

# A line holds what was put together, so that a kill tears all of it or nothing. It starts with the keys, so that the index
# is read without parsing the answers.
_LINE = re.compile(rb'\{"keys":\[("[0-9a-f]{32}"(?:,"[0-9a-f]{32}")*)\],"answers":\[')
_KEY_LENGTH = 32
_OFFSET_BITS = 44


def content_key(content: Any) -> str:
    """
    Name of a request by its content: the first 32 hexadecimal digits of the SHA-256 of its canonical JSON.

    Args:
        content (`Any`):
            Everything that the answer depends on, JSON-able.

    Returns:
        `str`: The key.
    """
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:_KEY_LENGTH]


def prepare_folder(cache_dir: str | os.PathLike | None) -> None:
    """
    Make the folder of a store, so that it shows whether it can be written to before an answer is paid for.

    Args:
        cache_dir (`str` or `os.PathLike`, *optional*):
            The folder; `None` for a store in memory.

    Raises:
        `ValueError`: If it cannot be made or written to.
    """
    if cache_dir is None:
        return
    try:
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"`cache_dir` cannot be made: {error}.") from error
    if not os.access(cache_dir, os.W_OK | os.X_OK):
        raise ValueError(f"`cache_dir` cannot be written to: `{cache_dir}`.")


class AnswerStore:
    """
    Answers by the content of their requests, in a folder.

    When [`~AnswerStore.put`] returns, the answer is with the operating system: killing the process loses nothing. What
    a failure of the machine itself can lose is what its kernel had not written out yet, seconds of answers at most.

    Everything that lay in the folder when the store was opened or last refreshed can be looked up, of all processes and
    runs. Of an answer that is there more than once, the first one read counts. Memory: about 200 bytes an answer for the index;
    the answers themselves stay on disk.

    Args:
        cache_dir (`str` or `os.PathLike`, *optional*):
            Folder of the answers, made with the first one. `None` keeps them in memory, for as long as the store lives.

    Raises:
        `ValueError`: If a file in the folder has the name of a file of answers and is none.
    """

    def __init__(self, cache_dir: str | os.PathLike | None = None) -> None:
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self._memory: dict[str, dict] = {}
        # The number of the file in the high bits, the place of the line in the low ones: one integer takes a third of
        # the memory of a tuple.
        self._index: dict[bytes, int] = {}
        self._files: list[Path] = []
        # How far each file has been read.
        self._read_up_to: dict[Path, int] = {}
        self._reader: tuple[int, Any] | None = None
        self._writer: io.FileIO | None = None
        self._own = self._size = 0
        self.refresh()

    def __len__(self) -> int:
        return len(self._memory) + len(self._index)

    def __contains__(self, key: str) -> bool:
        return key in self._memory or bytes.fromhex(key) in self._index

    def get(self, key: str) -> dict | None:
        """
        Look an answer up.

        Args:
            key (`str`):
                Key of the request, from [`content_key`].

        Returns:
            `dict` or `None`: The answer, or `None` if there is none.
        """
        if self.cache_dir is None:
            return self._memory.get(key)
        place = self._index.get(bytes.fromhex(key))
        if place is None:
            return None
        number, offset = place >> _OFFSET_BITS, place & ((1 << _OFFSET_BITS) - 1)
        if self._reader is None or self._reader[0] != number:
            # One file is open at a time: a folder that many processes have used holds more than may be open at once.
            if self._reader is not None:
                self._reader[1].close()
            self._reader = (number, open(self._files[number], "rb"))
        file = self._reader[1]
        file.seek(offset)
        line = json.loads(file.readline())
        return line["answers"][line["keys"].index(key)]

    def put(self, key: str, answer: dict) -> None:
        """
        Keep an answer.

        Args:
            key (`str`):
                Key of the request, from [`content_key`].
            answer (`dict`):
                The answer, JSON-able.
        """
        self.put_many([(key, answer)])

    def put_many(self, answers: Iterable[tuple[str, dict]]) -> None:
        """
        Keep several answers together: after a kill, all of them are there or none.

        Args:
            answers (`Iterable[tuple[str, dict]]`):
                Keys and answers.

        Raises:
            `OSError`: If they cannot be written, for example because the disk is full.
        """
        if self.cache_dir is None:
            for key, answer in answers:
                self._memory.setdefault(key, answer)
            return
        if self._writer is None:
            self._writer = self._open()
        together: dict[str, dict] = {}
        for key, answer in answers:
            together.setdefault(key, answer)
        content = {"keys": list(together), "answers": list(together.values())}
        line = json.dumps(content, separators=(",", ":")).encode() + b"\n"
        data = memoryview(line)
        try:
            while data:
                data = data[self._writer.write(data) :]
            for key in together:
                self._index.setdefault(bytes.fromhex(key), self._own << _OFFSET_BITS | self._size)
            self._size += len(line)
            self._read_up_to[self._files[self._own]] = self._size
        except BaseException:
            # A full disk, or an interrupt from the keyboard. The torn line stays the last one of its file: what is put
            # later goes to another.
            self._writer.close()
            self._writer = None
            raise

    def refresh(self) -> None:
        """Take in what other processes and runs have written to the folder since the store was opened."""
        if self.cache_dir is None or not self.cache_dir.is_dir():
            return
        own = None if self._writer is None else self._files[self._own]
        paths = [path for path in sorted(self.cache_dir.glob("answers-*.jsonl")) if path != own]
        torn = sum(not self._load(path) for path in paths)
        if torn:
            logger.info(f"{torn} unfinished answers in `{self.cache_dir}` are ignored.")

    def flush(self) -> None:
        """Have the operating system write everything out to the disk."""
        if self._writer is not None:
            os.fsync(self._writer)

    def close(self) -> None:
        """Write everything out, and close the files. The store can be read and written on."""
        self.flush()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._reader is not None:
            self._reader[1].close()
            self._reader = None

    def _open(self) -> io.FileIO:
        assert self.cache_dir is not None
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        # The rank is for people who look into the folder; what keeps writers apart is the random part.
        path = self.cache_dir / f"answers-{PartialState().process_index:05d}-{uuid.uuid4().hex}.jsonl"
        # Without a buffer, so that what was written is with the operating system.
        file = io.FileIO(path, "x")
        self._own = len(self._files)
        self._files.append(path)
        self._read_up_to[path] = self._size = 0
        return file

    def _load(self, path: Path) -> bool:
        if path not in self._read_up_to:
            self._read_up_to[path] = 0
            self._files.append(path)
        place = self._files.index(path) << _OFFSET_BITS
        with open(path, "rb") as file:
            file.seek(self._read_up_to[path])
            for line in file:
                # Only the last line can be torn: a writer that fails never writes again. One that lives may finish it.
                if not line.endswith(b"\n"):
                    return False
                start = _LINE.match(line)
                if start is None:
                    raise ValueError(
                        f"`{path}` is no file of answers. Remove it from `cache_dir`, or take another folder."
                    )
                offset = self._read_up_to[path]
                for key in start[1].decode().split(","):
                    self._index.setdefault(bytes.fromhex(key.strip('"')), place | offset)
                self._read_up_to[path] = offset + len(line)
        return True
