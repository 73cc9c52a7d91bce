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

"""What one process decides for all."""

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list


T = TypeVar("T")


def on_main_process(accelerator: Any, function: Callable[[], T]) -> T:
    """
    Have the main process alone decide something, and all processes take its answer: what they work out by themselves
    might differ. All processes must call this.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            The accelerator.
        function (`Callable`):
            What the main process calls.

    Returns:
        What it returns, on all processes.

    Raises:
        Its error on the main process, and on the others one with the same text, as they would wait for ever.
    """
    outcome: list[Any] = [None, None]
    failure = None
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except Exception as error:
            # Not every error can be sent.
            failure, outcome[1] = error, (isinstance(error, ValueError), str(error))
    broadcast_object_list(outcome, from_process=0)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise (ValueError if outcome[1][0] else RuntimeError)(outcome[1][1])
    return outcome[0]
