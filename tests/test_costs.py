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

import pytest

from trl_bpo.api.costs import Price, dollars, estimate_tokens, model_price


ENTRY = {"input_cost_per_token": 2e-6, "output_cost_per_token": 8e-6}


def test_prices_of_the_package():
    price = model_price("gpt-4.1-mini")
    assert 0 < price.input < price.output < 1e-3
    assert model_price("no such model") is None


def test_own_prices_go_first():
    price = model_price("mine", {"mine": {**ENTRY, "mode": "chat", "max_tokens": None}})
    assert price == Price(2e-6, 8e-6, 1e-6, 4e-6)
    assert model_price("gpt-4.1-mini", {"gpt-4.1-mini": ENTRY}) == price
    assert model_price("gpt-4.1-mini", {"mine": ENTRY}) == model_price("gpt-4.1-mini")


def test_prices_from_a_file(tmp_path):
    path = tmp_path / "prices.json"
    path.write_text(json.dumps({"sample_spec": {"input_cost_per_token": "a text"}, "mine": ENTRY}))
    assert model_price("mine", path) == model_price("mine", str(path)) == model_price("mine", {"mine": ENTRY})


@pytest.mark.parametrize("content", [None, "no JSON", "[1, 2]", "7"])
def test_file_that_is_no_table(tmp_path, content):
    path = tmp_path / "prices.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match="`prices` must be a dictionary or a JSON file.*prices.json"):
        model_price("mine", path)


def test_batch_prices():
    price = model_price("mine", {"mine": {**ENTRY, "input_cost_per_token_batches": 5e-7}})
    assert price.of(1000, 100) == pytest.approx(1000 * 2e-6 + 100 * 8e-6)
    assert price.of(1000, 100, batch=True) == pytest.approx(1000 * 5e-7 + 100 * 4e-6)


def test_free_model():
    assert model_price("mine", {"mine": dict.fromkeys(ENTRY, 0)}).of(10**6, 10**6) == 0


@pytest.mark.parametrize("value", [None, "0.1", -1e-6, float("nan"), float("inf"), True])
def test_unusable_price(value):
    with pytest.raises(ValueError, match="entry of `mine` in `prices` must give `output_cost_per_token`"):
        model_price("mine", {"mine": {**ENTRY, "output_cost_per_token": value}})


@pytest.mark.parametrize("entry", [{}, None, 3e-6, [1e-6, 2e-6]])
def test_entry_without_prices(entry):
    with pytest.raises(ValueError, match="must give `input_cost_per_token`"):
        model_price("mine", {"mine": entry})


@pytest.mark.parametrize(
    ("amount", "text"), [(0, "$0.00"), (1234.5, "$1,234.50"), (1, "$1.00"), (0.03124, "$0.0312"), (0.99, "$0.9900")]
)
def test_dollars(amount, text):
    assert dollars(amount) == text


@pytest.mark.parametrize(("text", "tokens"), [("", 1), ("x" * 399, 100), ("é" * 200, 101), ("\ud800", 1)])
def test_estimate_tokens(text, tokens):
    assert estimate_tokens(text) == tokens
