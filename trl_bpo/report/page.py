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

"""The report of a run as one page that needs no network, with its pictures and numbers beside it."""

import html
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import matplotlib as mpl
import pyarrow.parquet as pq

from ..manifest import write_json
from ..run_folder import RunFolder
from ..visible import excerpt
from . import figures
from .numbers import statistics
from .panels import Panel, all_panels, numbers_of


if TYPE_CHECKING:
    from matplotlib.figure import Figure


_DPI = 180
_TEMPLATES = Path(__file__).parent.parent / "templates"
_COLOURS = {
    figures.TEXT: "var(--text)",
    figures.MUTED: "var(--muted)",
    figures.GRID: "var(--grid)",
    figures.KEPT: "var(--kept)",
    figures.DROPPED: "var(--dropped)",
}


def _svg(figure: "Figure", name: str, alt: str) -> str:
    # Text stays text, and the same numbers give the same bytes.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # The page has several, whose parts have the same names.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
    # The theme of the page colours them, and its width is theirs.
    for colour, variable in _COLOURS.items():
        svg = re.sub(f"{colour}(?![0-9a-f])", variable, svg, flags=re.IGNORECASE)
    svg = re.sub(r"'?DejaVu Sans'?[^;\"]*", "system-ui, sans-serif", svg)
    opening = re.match(r"<svg[^>]*>", svg)
    assert opening is not None
    start = re.sub(r' (width|height)="[^"]*"', "", opening[0])
    label = html.escape(alt, quote=True)
    return f'{start[:-1]} role="img" aria-label="{label}">{svg[opening.end() :]}'


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _key_numbers(run: RunFolder) -> list[tuple[str, str]]:
    numbers = []
    if run.breadth is not None:
        metrics = run.breadth.metrics
        numbers.append(("prompts kept", f"{metrics['prompts_kept']:,} of {metrics['prompts']:,}"))
    if run.selections:
        last = run.selections[-1]
        numbers.append(("pairs kept", f"{int(last.metrics['active_pairs']):,} of {last.pairs.num_rows:,}"))
        numbers.append(("selections", f"{len(run.selections):,}, the last at step {last.step:,}"))
        numbers.append(("strategy", excerpt(last.manifest["parameters"]["depth_strategy"], 40)))
    cost = [stage["cost"] for stage in run.funnel if stage["cost"] is not None]
    return [*numbers, ("money", f"US$ {sum(cost):.2f}")] if cost else numbers


def _provenance(run: RunFolder) -> list[tuple[str, str]]:
    rows = []
    manifests = {"breadth": run.breadth.manifest} if run.breadth is not None else {}
    if run.selections:
        manifests["depth"] = run.selections[-1].manifest
    for stage, manifest in manifests.items():
        for kind in ("inputs", "parameters", "outputs"):
            rows += [(f"{stage}: {name}", value) for name, value in manifest[kind].items()]
    if manifests:
        rows += [(f"version of {name}", value) for name, value in list(manifests.values())[-1]["versions"].items()]
    return [(excerpt(name), excerpt(str(value))) for name, value in rows]


def write_page(path: str | Path) -> Path:
    """
    Write the report of a run, see [`~report.write_report`].

    Args:
        path (`str` or `Path`):
            The `output_dir` of the run.

    Returns:
        `Path`: The page.
    """
    run = RunFolder(path)
    folder = run.path / "_report"
    folder.mkdir(exist_ok=True)
    sections = all_panels(run)
    panels = [panel for section in sections.values() for panel in section]
    # Those of an earlier report may be of panels that this one does not have.
    for old in [*folder.glob("*.png"), *folder.glob("*.parquet")]:
        old.unlink()
    for panel in panels:
        if panel.figure is not None:
            panel.figure.savefig(folder / f"{panel.name}.png", dpi=_DPI)
        if panel.points is not None:
            pq.write_table(panel.points, folder / f"{panel.name}.parquet")
    before_after = []
    if run.pool is not None:
        selected = run.selections[-1].pairs["depth_selected"].to_numpy()
        before_after = statistics(run.pool, selected)
    numbers = {"run": excerpt(run.name), "statistics": before_after, "panels": numbers_of(panels)}
    write_json(folder / "numbers.json", numbers)

    def drawn(panel: Panel) -> dict[str, Any]:
        svg = None if panel.figure is None else _svg(panel.figure, panel.name, panel.alt)
        return {
            "name": panel.name,
            "heading": panel.heading,
            "text": panel.text,
            "svg": svg,
            "columns": panel.columns,
            "rows": [[_cell(cell) for cell in row] for row in panel.rows],
            "wide": panel.figure is None and bool(panel.rows),
        }

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html").render(
        name=excerpt(run.name),
        key_numbers=_key_numbers(run),
        funnel=[(excerpt(one["stage"]), f"{one['rows']:,}", excerpt(one["note"])) for one in run.funnel],
        statistics=[
            (measure, *("" if value is None else f"{value:.4g}" for value in values))
            for measure, *values in before_after
        ],
        sections={heading: [drawn(panel) for panel in section] for heading, section in sections.items()},
        provenance=_provenance(run),
    )
    file = folder / "index.html"
    # A lone surrogate has no encoding.
    file.write_text(page, encoding="utf-8", errors="backslashreplace")
    return file
