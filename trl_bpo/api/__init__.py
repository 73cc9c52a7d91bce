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

"""Requests to OpenAI-compatible APIs: every answer is kept, paid for once, and accounted for."""

from .client import APIClient
from .errors import CollectionStopped
from .records import APIReport, APIRequest, CostEstimate, check_extra_body, total_report


__all__ = [
    "APIClient",
    "APIReport",
    "APIRequest",
    "CollectionStopped",
    "CostEstimate",
    "check_extra_body",
    "total_report",
]
