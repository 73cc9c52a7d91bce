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

"""The report of a run: its numbers against ones worked out here, and the page in a real browser."""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pyarrow.parquet as pq
import pytest
from run_files import save_pairs, save_run

from trl_bpo.report import write_report
from trl_bpo.run_folder import RunFolder
from trl_bpo.visible import excerpt


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SWITCHES = [
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run", "--disable-quic"),
]
HOSTILE = [
    "<script>document.title = 'taken'</script>",
    '"><img src=x onerror="document.title=\'taken\'">',
    "</svg><h1 id='injected'>big</h1>",
    "{{ 7 * 7 }} {% raw %} {# gone #}",
    "\u202eright to left\u202c and zero\u200bwidth",
    "nul \x00 bell \x07 escape \x1b[31m",
    "$\\frac{1}{0}$ and `code` ![x](http://127.0.0.1:9/x.png)",
    "&lt;b&gt; &amp; <b>bold</b>",
    "x" * 1_000_000,
    "---\nlicense: mit\n---",
    "line one\nline two\r\u2028line three",
    "</title><style>*{display:none}</style>",
]
PROMPTS = [f"A question about {topic} number {i}" for i in range(8) for topic in ("cats", "law", "rain")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "my-run"
    save_run(folder, PROMPTS)
    return folder, write_report(folder)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "<img src=x>&{{ 7 * 7 }}"
    save_run(folder, HOSTILE)
    stages = [
        {"stage": text[:500], "rows": 1, "note": text, "seconds": 1.0, "tokens": None, "cost": None}
        for text in (*HOSTILE, "prompts kept (breadth)", "scores")
    ]
    (folder / "_funnel.json").write_text(json.dumps(stages))
    return folder, write_report(folder)


def numbers(page):
    return json.loads((page.parent / "numbers.json").read_text())["panels"]


def rows(page, panel):
    return numbers(page)[panel]["rows"]


def test_files(run):
    folder, page = run
    assert page == folder / "_report" / "index.html"
    panels = numbers(page)
    pictures = {path.stem for path in page.parent.glob("*.png")}
    assert pictures == set(panels) - {"breadth_examples"}
    for path in page.parent.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 3000
    assert pq.read_table(page.parent / "prompt_map.parquet").num_rows == len(PROMPTS)


def test_numbers_are_those_of_the_run(run):
    folder, page = run
    saved = RunFolder(folder)
    last = saved.selections[-1].pairs.to_pandas()
    kept = last[last["depth_selected"]]
    per_prompt = last.groupby("prompt_id")["depth_selected"].sum().value_counts()
    assert {row[0]: row[1] for row in rows(page, "pairs_per_prompt") if row[1]} == per_prompt.to_dict()
    sizes = last.groupby("depth_cluster").size()
    assert {row[0]: (row[1], row[2]) for row in rows(page, "depth_clusters")} == {
        cluster: (size, int((kept["depth_cluster"] == cluster).sum())) for cluster, size in sizes.items()
    }
    for panel, total in (("depth_distances", len(last)), ("margins", len(last)), ("lengths", len(last))):
        assert sum(row[1] for row in rows(page, panel)) == len(kept)
        assert sum(row[1] + row[2] for row in rows(page, panel)) == total
    before = saved.selections[0].pairs["depth_selected"].to_numpy()
    after = saved.selections[1].pairs["depth_selected"].to_numpy()
    overlap = round(float((before & after).sum() / (before | after).sum()), 3)
    assert rows(page, "drift") == [[0, "", 1.0], [5, overlap, overlap]]
    costs = [["rows", 0.05, "", ""], ["prompts kept (breadth)", 0.02, "", ""], ["scores", 1.5, 12345, 1.5]]
    assert rows(page, "costs") == costs


def test_scores_ties_and_unreadable_verdicts(run):
    _, page = run
    panel = numbers(page)["scores"]
    n = len(PROMPTS)
    counts = {"1": n - 1, "2": n - 1, "3": n - 1, "4": 0, "5": 2, "6": 0, "7": 1}
    assert {row[0]: row[1] for row in panel["rows"]} == counts
    # One tie among the three pairs of the first prompt, none among those of the others.
    assert f"1 of {3 * n} pairs" in panel["text"]
    assert f"1 responses got no score that could be read, {n - 1} were empty" in panel["text"]


def test_the_same_run_gives_the_same_page(run):
    folder, page = run
    first = page.read_bytes()
    assert write_report(folder).read_bytes() == first


def test_what_is_missing_is_said(tmp_path):
    save_pairs(tmp_path / "run", PROMPTS, steps=(0,), strategy="random", scores=False)
    page = write_report(tmp_path / "run")
    panels = numbers(page)
    assert "one selection" in panels["drift"]["text"] and "No breadth selection" in panels["breadth"]["text"]
    assert "no scores" in panels["margins"]["text"] and "No costs" in panels["costs"]["text"]
    assert {"depth_scores", "lengths", "pairs_per_prompt"} <= set(panels) and "depth_clusters" not in panels
    text = page.read_text()
    for panel in panels.values():
        assert panel["heading"] in text


def test_files_of_an_earlier_run_are_left_out(tmp_path):
    save_run(tmp_path / "run", PROMPTS)
    stage = {"stage": "rows", "rows": 9, "note": "pairs", "seconds": 1.0, "tokens": None, "cost": None}
    (tmp_path / "run" / "_funnel.json").write_text(json.dumps([stage]))
    panels = numbers(write_report(tmp_path / "run"))
    assert "No breadth selection" in panels["breadth"]["text"] and "were there before" in panels["scores"]["text"]


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(ValueError, match="not the folder of a run"):
        write_report(tmp_path)


class Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_one_file_without_script(run, hostile):
    for _, page in (run, hostile):
        elements = Elements()
        elements.feed(page.read_text())
        assert not {"script", "iframe", "object", "embed", "form", "b1", "img"} & set(elements.tags)
        assert not [name for name, _ in elements.attributes if name.startswith("on")]
        addresses = [value for name, value in elements.attributes if name in ("src", "href", "xlink:href")]
        assert all(value.startswith(("#", "data:")) for value in addresses), addresses
        ids = [value for name, value in elements.attributes if name == "id"]
        assert len(ids) == len(set(ids))
        used = re.findall(r"url\(#([^)]+)\)", page.read_text()) + [value[1:] for value in addresses if value[0] == "#"]
        assert set(used) <= set(ids)
        assert page.stat().st_size < 1_500_000


def test_no_path_of_this_machine(run):
    folder, page = run
    for file in page.parent.iterdir():
        assert str(folder.parent).encode() not in file.read_bytes()


def test_hostile_texts_are_shown_as_text(hostile):
    _, page = hostile
    elements = Elements()
    elements.feed(page.read_text())
    text = "".join(elements.text)
    for prompt in HOSTILE:
        assert excerpt(prompt) in text
    assert "49" not in elements.text and "\\u202eright to left" in text and "\\x00" in text
    assert "x" * 400 not in text and not re.search("[\u202a-\u202e\u2066-\u2069\u200b\x00\x1b]", text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\t c", "a b c"),
        ("a\u202eb", "a\\u202eb"),
        ("\x00\u200b", "\\x00\\u200b"),
        ("é 漢字 🙂", "é 漢字 🙂"),
        ("\ud800", "\\ud800"),
        ("x" * 500, "x" * 300 + "…"),
    ],
)
def test_excerpt(text, shown):
    assert excerpt(text) == shown


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(360, 740), (1280, 900)])
@pytest.mark.parametrize("which", ["run", "hostile"])
def test_the_page_in_a_browser(browser, request, which, width, height, scheme):
    folder, file = request.getfixturevalue(which)
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    messages, requests = [], []
    page.on("console", lambda message: messages.append((message.type, message.text)))
    page.on("pageerror", lambda error: messages.append(("error", str(error))))
    page.on("request", lambda one: requests.append(one.url))
    page.goto(file.resolve().as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert not messages
    # Nothing but the page itself; the icon is empty.
    assert [url for url in requests if not url.startswith("data:")] == [file.resolve().as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.title() == f"{excerpt(folder.name)}: what BPO kept"
    pictures = page.evaluate(
        """[...document.querySelectorAll('svg')].map(svg => {
            const box = svg.getBoundingClientRect();
            return [box.width, box.height, svg.querySelectorAll('path').length, svg.getAttribute('aria-label').length]
        })"""
    )
    assert len(pictures) == 13
    assert all(w > 0.5 * min(width, 400) and h > 100 and paths > 5 and label > 20 for w, h, paths, label in pictures)
    assert page.evaluate("document.querySelectorAll('#injected, img, script').length") == 0
    # Texts of the pictures can be read on a phone.
    sizes = page.evaluate(
        """[...document.querySelectorAll('svg text')].map(text =>
            text.getBoundingClientRect().height).filter(height => height > 0)"""
    )
    assert np.median(sizes) >= 9
    context.close()
