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


"""How many clusters: the variance that K-means explains of a sample by their number, and where that curve bends."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .clustering import cluster, default_n_clusters, gaussian_sample
from .embedding import DEFAULT_ENCODER
from .run_folder import RunFolder


Curve = list[tuple[int, float]]
_VALUES = 10
# A bend of less than this share of the height of a curve is within what the seed of K-means changes.
_BEND = 0.02
# One draw of the Gaussian is within a few percent of the next.
_EXCESS = 0.05


def _default_ks(n: int) -> list[int]:
    largest = min(n, max(2, n // 4, default_n_clusters(n)))
    ks = np.geomspace(min(2, n), largest, _VALUES).round().astype(int).tolist()
    return sorted({*ks, default_n_clusters(n)})


def elbow(sample: np.ndarray, ks: list[int] | None = None, seed: int = 42) -> Curve:
    """
    Variance that K-means explains of some rows, for several numbers of clusters.

    Args:
        sample (`np.ndarray` of shape `(n, d)`):
            The rows. Must be finite.
        ks (`list[int]`, *optional*):
            Numbers of clusters, each from 1 to `n`. If `None`, about ten in a geometric progression from 2 to `n / 4`,
            with the default of the selections, `round(sqrt(n / 2))`, among them.
        seed (`int`, *optional*, defaults to `42`):
            Seed of K-means.

    Returns:
        `list[tuple[int, float]]`: Number of clusters and variance explained, in the order of `ks`.

    Raises:
        `ValueError`: If there is no row, or a number of clusters is out of range.
    """
    n = len(sample)
    if n == 0:
        raise ValueError("There is no row to cluster.")
    ids = [f"{row:09d}" for row in range(n)]
    return [(k, cluster(sample, ids, k, seed).variance_explained) for k in (_default_ks(n) if ks is None else ks)]


def gaussian_elbow(sample: np.ndarray, ks: list[int], seed: int = 42, normalize: bool = True) -> Curve:
    """
    The same of a Gaussian with the sample mean and covariance of the rows, which has no clusters.

    Args:
        sample (`np.ndarray` of shape `(n, d)`):
            The rows, of unit length if `normalize`.
        ks (`list[int]`):
            Numbers of clusters.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the Gaussian and of K-means.
        normalize (`bool`, *optional*, defaults to `True`):
            Whether the Gaussian is scaled to unit length, as the rows were.

    Returns:
        `list[tuple[int, float]]`: Number of clusters and variance explained, in the order of `ks`.
    """
    return elbow(gaussian_sample(sample, seed, normalize), ks, seed)


def _above_chord(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (y - y[0]) / (y[-1] - y[0]) - (x - x[0]) / (x[-1] - x[0])


def suggested(curve: Sequence[tuple[int, float]]) -> int:
    """
    Number of clusters at the knee of a curve: its point farthest above the chord from its first to its last point, with
    both axes scaled to [0, 1].

    The number of clusters is taken by its logarithm, in which the curve of data without clusters is straight or bends
    upwards: K-means leaves a share of about `k ** (-2 / d)` of the variance of a cloud in `d` dimensions, and close to
    one row a cluster it follows the noise. So what bends downwards there are clusters. On a linear axis every curve has a
    knee, and where it lies depends on the largest number that was tried. It is used where the logarithm shows none, and
    then says only from where on a further cluster gains less than the others do on average.

    Clusters are worth their name only where the curve exceeds that of [`gaussian_elbow`], wherever its knee.

    Args:
        curve (`Sequence[tuple[int, float]]`):
            Number of clusters, at least 1, and variance explained.

    Returns:
        `int`: One of the numbers of clusters of the curve; the smallest of a straight line.

    Raises:
        `ValueError`: If the curve has no point.
    """
    if not curve:
        raise ValueError("The curve has no point.")
    ks, values = np.asarray(sorted(curve)).T
    if len(ks) > 1 and values[-1] - values[0] > 0:
        for axis in (np.log(ks), ks):
            above = _above_chord(axis, values)
            if above.max() > _BEND:
                return int(ks[above.argmax()])
    return int(ks[0])


@dataclass(frozen=True)
class Suggestion:
    """
    Numbers of clusters for one stage.

    Attributes:
        stage (`str`):
            `"breadth"` or `"depth"`.
        rows (`int`):
            Prompts or pairs that are to be clustered.
        sampled (`int`):
            How many of them were.
        curve (`list[tuple[int, float]]`):
            Number of clusters and variance explained.
        gaussian (`list[tuple[int, float]]`):
            The same of a Gaussian of equal covariance.
        suggested (`int`):
            Number of clusters at the knee of the curve.
        used (`int`, *optional*):
            Number of clusters of the run.
    """

    stage: str
    rows: int
    sampled: int
    curve: Curve
    gaussian: Curve
    suggested: int
    used: int | None = None

    @property
    def excess(self) -> float:
        """By how much the suggested clusters explain more than those of the Gaussian, as a share of the latter."""
        mine, null = dict(self.curve)[self.suggested], dict(self.gaussian)[self.suggested]
        return mine / null - 1.0 if null > 0 else 0.0

    @property
    def text(self) -> str:
        """A table of both curves and what to make of them."""
        noun = "prompts" if self.stage == "breadth" else "pairs"
        of = "" if self.sampled == self.rows else f", a sample of {self.sampled:,} of them"
        default = default_n_clusters(self.rows)
        lines = [f"Clusters for {self.stage}: {self.rows:,} {noun}{of}", ""]
        lines.append(f"{'clusters':>10}{'variance explained':>22}{'of a Gaussian':>17}")
        for (k, value), (_, null) in zip(self.curve, self.gaussian, strict=True):
            marks = {"suggested": self.suggested, "used": self.used, "default": default}
            mark = ", ".join(name for name, number in marks.items() if number == k)
            lines.append(f"{k:>10,}{value:>22.3f}{null:>17.3f}   {mark}".rstrip())
        lines += ["", f"Suggested: {self.suggested:,} clusters, where the curve bends. The default is {default:,}."]
        if self.excess > _EXCESS:
            lines.append(f"They explain {self.excess:.0%} more than those of a Gaussian of the same covariance.")
        else:
            lines.append("A Gaussian of the same covariance explains as much: these are no clusters worth the name,")
            lines.append("and their number hardly matters.")
        return "\n".join(lines)


def _suggest(
    stage: str, rows: int, sample: np.ndarray, normalize: bool, seed: int, used: int | None = None
) -> Suggestion:
    sample = sample.astype(np.float64)
    if normalize:
        # Saved in half precision.
        sample /= np.linalg.norm(sample, axis=1, keepdims=True)
    curve = elbow(sample, seed=seed)
    gaussian = gaussian_elbow(sample, [k for k, _ in curve], seed, normalize)
    return Suggestion(stage, rows, len(sample), curve, gaussian, suggested(curve), used)


def suggest_for_run(run: RunFolder, seed: int = 42) -> list[Suggestion]:
    """
    Suggest numbers of clusters by the samples that a run saved.

    Args:
        run ([`~run_folder.RunFolder`]):
            The run.
        seed (`int`, *optional*, defaults to `42`):
            Seed of K-means and of the Gaussian.

    Returns:
        `list[Suggestion]`: One for each stage that clustered.

    Raises:
        `ValueError`: If the run clustered nothing.
    """
    suggestions = []
    if run.breadth is not None:
        metrics = run.breadth.metrics
        used = int(metrics["n_clusters"])
        suggestions.append(_suggest("breadth", metrics["prompts"], run.breadth.sample, True, seed, used))
    last = run.selections[-1] if run.selections else None
    # A selection by scores leaves the sample of an earlier run where it is.
    if last is not None and "n_clusters" in last.metrics and run.feature_sample is not None:
        normalize = last.manifest["parameters"]["normalize_gradients"]
        used = int(last.metrics["n_clusters"])
        suggestions.append(_suggest("depth", last.pairs.num_rows, run.feature_sample, normalize, seed, used))
    if not suggestions:
        raise ValueError(
            f"The run {run.name!r} clustered nothing: its `depth_strategy` goes by scores, and there was no breadth "
            "selection."
        )
    return suggestions


def suggest_for_prompts(
    name: str,
    *,
    split: str = "train",
    prompt_column: str = "prompt",
    encoder: str = DEFAULT_ENCODER,
    sample: int = 4096,
    seed: int = 42,
) -> Suggestion:
    """
    Suggest a number of clusters for breadth selection, from a random sample of the distinct prompts of a dataset.

    Args:
        name (`str`):
            File, folder or Hub id, as [`~formats.load_rows`] takes it.
        split (`str`, *optional*, defaults to `"train"`):
            Split of the dataset.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column that holds the prompt.
        encoder (`str`, *optional*, defaults to `"sentence-transformers/all-MiniLM-L6-v2"`):
            Sentence-transformers model id or path.
        sample (`int`, *optional*, defaults to `4096`):
            Distinct prompts that are embedded at most.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the sample, of K-means and of the Gaussian.

    Returns:
        [`Suggestion`]: The curve and its knee.

    Raises:
        `ValueError`: If `sample` is not positive, or the dataset has no prompts.
        `ImportError`: If sentence-transformers is not installed.
    """
    from .embedding import embed_texts, encoder_fingerprint, require_sentence_transformers
    from .formats import load_rows, prepare_dataset
    from .prompts import prompt_id, render_prompt

    if sample < 1:
        raise ValueError(f"`sample` must be at least 1, got {sample}.")
    require_sentence_transformers("`trl-bpo suggest` of a dataset")
    rows = prepare_dataset(load_rows(name, split), prompt_column=prompt_column, start_from="prompts").dataset
    columns = [column for column in ("prompt", "tools") if column in rows.column_names]
    rows = rows.select_columns(columns)
    first = {prompt_id(row["prompt"], row.get("tools")): number for number, row in enumerate(rows)}
    # By id, so that neither the order nor repeats of the rows decide what is sampled.
    distinct = [first[one] for one in sorted(first)]
    drawn = np.random.default_rng(seed).permutation(len(distinct))[:sample]
    texts = [render_prompt(row["prompt"], row.get("tools")) for row in rows.select([distinct[i] for i in drawn])]
    embeddings, _ = embed_texts(texts, encoder, content=encoder_fingerprint(encoder))
    return _suggest("breadth", len(distinct), embeddings, True, seed)


def save_figure(suggestion: Suggestion, path: str | Path) -> None:
    """
    Draw the curve.

    Args:
        suggestion ([`Suggestion`]):
            The curve and its knee.
        path (`str` or `Path`):
            File to write; its suffix chooses the format.

    Raises:
        `ImportError`: If `matplotlib` is not installed.
        `ValueError`: If the suffix is of no known format.
    """
    from .report.figures import elbow_figure

    title = f"Number of clusters for {suggestion.stage}"
    elbow_figure(suggestion.curve, suggestion.suggested, suggestion.gaussian, title).savefig(path, dpi=150)
