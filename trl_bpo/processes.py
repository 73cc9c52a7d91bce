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

"""What processes do by themselves, and what one of them decides for all."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list, gather_object


T = TypeVar("T")

_FIRST_POLL_SECONDS, _MAX_POLL_SECONDS = 0.01, 5.0


class Attempts:
    """
    What one process does between collective operations that all take part in: a process that stopped alone would leave the
    others waiting for it.

    Args:
        state ([`~accelerate.Accelerator`] or [`~accelerate.PartialState`]):
            The processes.
    """

    def __init__(self, state: Any) -> None:
        self._state = state
        self._failure: Exception | None = None

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """
        Call a function, unless one has failed before.

        Args:
            function (`Callable`):
                What to call, with the other arguments.

        Returns:
            What it returns; `None` if it failed.
        """
        if self._failure is None:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                self._failure = error
        return None

    def check(self) -> None:
        """
        Tell all processes what has failed. All of them must call this.

        Raises:
            As [`meanwhile`] does.
        """

        def fail() -> None:
            if self._failure is not None:
                raise self._failure

        meanwhile(self._state, fail)


def meanwhile(state: Any, function: Callable[[], T]) -> T:
    """
    Call a function that may take long on some processes, and wait for all of them. All processes must call this.

    A process that waits in a collective operation for one that is busy is stopped by the time-out of the process group,
    after ten minutes with NCCL. So the function runs in a thread, while the processes ask each other every few seconds
    whether they are done. The function itself must not communicate.

    Args:
        state ([`~accelerate.Accelerator`] or [`~accelerate.PartialState`]):
            The processes.
        function (`Callable`):
            What to call.

    Returns:
        What it returns, on each process its own.

    Raises:
        Its error on the process that had it, and on the others one with the same text.
    """
    if state.num_processes == 1:
        return function()

    def call() -> T:
        # Which of the devices is the current one is a matter of each thread.
        if state.device.type == "cuda":
            torch.cuda.set_device(state.device)
        return function()

    seconds = _FIRST_POLL_SECONDS
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(call)
        while not all(gather_object([bool(wait([future], timeout=seconds).done)])):
            seconds = min(2 * seconds, _MAX_POLL_SECONDS)
    failure = future.exception()
    # Not every error can be sent.
    failures = gather_object([None if failure is None else (isinstance(failure, ValueError), str(failure))])
    if failure is not None:
        raise failure
    for is_value_error, text in filter(None, failures):
        raise (ValueError if is_value_error else RuntimeError)(text)
    return future.result()


def main_process_first(state: Any, function: Callable[[], T]) -> T:
    """
    Call a function whose result is cached on the disk: first on the main process, from whose cache the others take it where
    they share a disk. All processes must call this. Unlike the method of accelerate of that name, it leaves none of them in a
    collective operation that can time out.

    Args:
        state ([`~accelerate.Accelerator`] or [`~accelerate.PartialState`]):
            The processes.
        function (`Callable`):
            What to call, as in [`meanwhile`].

    Returns:
        What it returns, on each process its own.

    Raises:
        As [`meanwhile`] does.
    """
    if state.num_processes > 1:
        meanwhile(state, function if state.is_main_process else lambda: None)
    return meanwhile(state, function)


def on_main_process(state: Any, function: Callable[[], T]) -> T:
    """
    Have the main process alone decide something, however long that takes, and all processes take its answer: what they work
    out by themselves might differ. All processes must call this.

    Args:
        state ([`~accelerate.Accelerator`] or [`~accelerate.PartialState`]):
            The processes.
        function (`Callable`):
            What the main process calls, as in [`meanwhile`].

    Returns:
        What it returns, on all processes.

    Raises:
        Its error on the main process, and on the others one with the same text, as they would wait for ever.
    """
    outcome: list[Any] = [meanwhile(state, function if state.is_main_process else lambda: None)]
    broadcast_object_list(outcome, from_process=0)
    return outcome[0]
