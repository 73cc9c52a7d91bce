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


"""Generators and judges that give their results in parts, and how the others are called for parts."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar


T = TypeVar("T")

# Rows for which a generator or a judge without `stream` is called at a time.
ROWS_AT_A_TIME = 8192


def streams(asker: Any) -> bool:
    """
    Whether a generator or judge is to be asked through its method `stream`.

    Args:
        asker (`Callable`):
            The generator or judge.

    Returns:
        `bool`: Whether it has the method, and no subclass has overridden `__call__` alone.
    """
    for one in type(asker).__mro__:
        if "stream" in vars(one):
            return True
        if "__call__" in vars(one):
            return False
    return False


def in_blocks(rows: Iterable[T], size: int = ROWS_AT_A_TIME) -> Iterator[list[T]]:
    """
    Take rows together.

    Args:
        rows (`Iterable`):
            The rows.
        size (`int`, *optional*, defaults to `8192`):
            Number of rows in a block.

    Yields:
        `list`: The next `size` rows, at the end those that are left.
    """
    iterator = iter(rows)
    while block := list(islice(iterator, size)):
        yield block
