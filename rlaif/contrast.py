"""Contrast: how strongly the chosen and the rejected response of a preference set differ, as CLAIR measures it.

D'Oosterlinck et al., Anchored Preference Optimization and Contrastive Revisions (arXiv 2408.06266), compare preference sets by
the token Jaccard similarity and the character Levenshtein distance of the two responses: in a set of minimal revisions both
tell that little was changed, in one of two independent samples that the pair differs in much that has no bearing on the label.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import numpy.typing as npt
from rapidfuzz.distance import Levenshtein

from rlaif.data import as_messages, as_text, atomic, kind_of, read_rows, renamed, split_response
from rlaif.evaluate import tables
from rlaif.evaluate.agreement import Statistic, estimates
from rlaif.records import LABELLED, Row, UsageError

WORD = re.compile(r"\w+")

FORMS = {
    "preference": ("chosen", "rejected"),
    "labelled": ("response_a", "response_b", "label"),
    "revision": ("response", "revised"),
}
"""What rows may hold, the first that fits a file's first row, and the columns that each row then must have."""

METRICS = {
    "jaccard": "Jaccard",
    "levenshtein": "Levenshtein",
    "levenshtein_normalised": "Levenshtein / length",
    "length_characters": "characters more",
    "length_words": "words more",
    "longer": "chosen longer",
    "identical": "identical",
}
"""Metric to its name in a table; `contrast` says what each is."""

LEGEND = (
    "Jaccard: words (\\w+, lower-cased) that both responses have, of those that one has; 1 the same words, 0 none in common. "
    "Levenshtein: characters to insert, delete or replace; / length: of the longer response's characters. "
    "characters, words: how many more the chosen response has, on average. longer: share of the pairs of unequal length whose "
    "chosen response has more characters. Intervals: 95 %, by resampling prompts."
)

Floats = npt.NDArray[np.float64]


# ---------------------------------------------------------------- two texts


def words(text: str) -> list[str]:
    """The text's tokens: runs of letters, digits and underscores, lower-cased.

    >>> words("Don't panic, Zoë!")
    ['don', 't', 'panic', 'zoë']
    """
    return WORD.findall(text.lower())


def jaccard(first: Iterable[str], second: Iterable[str]) -> float:
    """|A ∩ B| / |A ∪ B| of the two sets of tokens, in [0, 1]; two empty sets are the same, so 1.

    >>> jaccard("abc", "bcd")
    0.5
    """
    a, b = set(first), set(second)
    return len(a & b) / len(a | b) if a or b else 1.0


def contrast(chosen: str, rejected: str) -> tuple[float, ...]:
    """The values of `METRICS`, in their order, of one pair.

    - `jaccard`: of the words, in [0, 1]
    - `levenshtein`: insertions, deletions and replacements of characters; `levenshtein_normalised`: of the longer text's
      length, in [0, 1]
    - `length_characters`, `length_words`: chosen − rejected
    - `longer`: 1 where the chosen one has more characters, 0 where it has fewer, NaN where both have as many
    - `identical`: 1 or 0
    """
    ours, theirs = words(chosen), words(rejected)
    more = len(chosen) - len(rejected)
    distance = Levenshtein.distance(chosen, rejected)
    return (
        jaccard(ours, theirs),
        float(distance),
        distance / (max(len(chosen), len(rejected)) or 1),
        float(more),
        float(len(ours) - len(theirs)),
        float(more > 0) if more else math.nan,
        float(chosen == rejected),
    )


# ---------------------------------------------------------------- rows


@dataclass(frozen=True, slots=True)
class Pair:
    """Two responses to one prompt, without blanks around them; `prompt` is a text or messages, None where none is known."""

    prompt: Any
    chosen: str
    rejected: str


def preference(row: Row, where: str) -> Pair | None:
    """A row of `chosen` and `rejected`, which are responses where there is a prompt, and else whole dialogues.

    Dialogues are split at their last assistant turn, so that what both sides share before it counts for neither; a text that
    is no dialogue is a response without a known prompt. None where the two sides go on from different prompts.

    Raises: UsageError for a value of another type, or messages that do not end with an assistant's turn.
    """
    first, chosen = response(row, "chosen", where)
    second, rejected = response(row, "rejected", where)
    return Pair(first, chosen, rejected) if first == second else None


def response(row: Row, column: str, where: str) -> tuple[Any, str]:
    """(prompt, response) of one side, or of any column that holds a text or messages. Raises: as `preference` does."""
    value, prompt = row[column], prompt_of(row, where)
    found, text = split_response(value, prompt)
    if text is None and isinstance(value, str):
        return None, value.strip()
    if text is None or (found is not None and as_text(found) is None):
        expected = "text, or messages that end with an assistant's turn"
        raise UsageError(f"{where}: column '{column}': expected {expected}, got {kind_of(value)}")
    return found, text.strip()


def prompt_of(row: Row, where: str) -> Any:
    """The row's prompt, or None where it has none. Raises: UsageError where it is neither text nor messages."""
    prompt = row.get("prompt")
    if prompt is not None and as_text(prompt) is None:
        raise UsageError(f"{where}: column 'prompt': expected text or messages, got {kind_of(prompt)}")
    return prompt


def prompt_text(prompt: Any) -> str:
    """The turns' contents, one after the other: the same for messages, an hh-rlhf dialogue and its last turn's opening.

    >>> prompt_text("Human: Hi\\n\\nAssistant:") == prompt_text([{"role": "user", "content": "Hi"}]) == prompt_text("Hi")
    True
    """
    return "\n".join(turn["content"].strip() for turn in as_messages(prompt)).strip()


def form_of(row: Row, where: str, forms: Mapping[str, tuple[str, ...]]) -> str:
    """The first form all of whose columns the row has. Raises: UsageError naming a column that is missing."""
    for name, columns in forms.items():
        if all(column in row for column in columns):
            return name
    wanted = "; or ".join(" and ".join(f"'{column}'" for column in columns) for columns in forms.values())
    raise UsageError(f"{where}: expected the columns {wanted}; there are: {', '.join(row)}")


def require(row: Row, columns: Iterable[str], where: str) -> None:
    """Raises: UsageError for a column that the row does not have, though the rows before it had."""
    for column in columns:
        if column not in row:
            raise UsageError(f"{where}: no column '{column}'; there are: {', '.join(row)}")


def _pair(row: Row, form: str, where: str) -> Pair | str:
    """The row's pair, or why it is left out."""
    if form == "preference":
        return preference(row, where) or "different prompts"
    if row.get("status", "ok") not in LABELLED:
        return str(row["status"])
    if form == "revision":
        return Pair(prompt_of(row, where), _text(row, "revised", where), _text(row, "response", where))
    label = row["label"]
    if label not in ("a", "b", "tie", None):
        raise UsageError(f"{where}: column 'label': {label!r} is not a label (allowed: a, b, tie, null)")
    if label in ("tie", None):
        return "tie" if label else "no label"
    a, b = _text(row, "response_a", where), _text(row, "response_b", where)
    return Pair(prompt_of(row, where), *((a, b) if label == "a" else (b, a)))


def _text(row: Row, column: str, where: str) -> str:
    if not isinstance(row[column], str):
        raise UsageError(f"{where}: column '{column}': expected text, got {kind_of(row[column])}")
    return str(row[column]).strip()


# ---------------------------------------------------------------- one dataset


@dataclass
class Contrast:
    """What one dataset came to: `values` has one row a pair and one column a metric, `prompts` says whose pair it is."""

    name: str
    form: str = ""
    rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    values: Floats = field(default_factory=lambda: np.empty((0, len(METRICS))))
    prompts: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def of(self, metric: str) -> Floats:
        """One metric of every pair that it is defined for."""
        column: Floats = self.values[:, list(METRICS).index(metric)]
        return column[~np.isnan(column)]

    def as_dict(self, resamples: int, seed: int) -> dict[str, Any]:
        """Counts and, for each metric, mean with its 95 % interval, median and the number of pairs; ready for JSON."""
        statistics = {name: _mean(self.values[:, number]) for number, name in enumerate(METRICS)}
        metrics = {}
        for name, estimate in estimates(statistics, self.prompts, resamples, seed).items():
            median = float(np.median(self.of(name))) if estimate.n else None
            metrics[name] = {**asdict(estimate), "median": median}
        return {
            "name": self.name,
            "form": self.form,
            "rows": self.rows,
            "pairs": len(self.values),
            "prompts": len(np.unique(self.prompts)),
            "left_out": dict(self.left_out),
            "metrics": metrics,
        }


def _mean(values: Floats) -> Statistic:
    """The mean of weighted rows, without those that are NaN."""
    defined = ~np.isnan(values)
    filled, counts = np.where(defined, values, 0.0), defined.astype(np.float64)

    def of(weights: Floats) -> float:
        whole = float(weights @ counts)
        return float(weights @ filled) / whole if whole else math.nan

    return Statistic(int(defined.sum()), of)


def measure(
    source: str, mapping: Mapping[str, str] | None = None, split: str | None = None, limit: int | None = None
) -> Contrast:
    """Measure every pair of a source; `mapping` renames columns, as {new: old}. Pairs without a prompt stand for themselves.

    Raises: UsageError naming file, line and column for what cannot be read or is of another type, and where no row is a pair.
    """
    found = Contrast(source)
    values: list[tuple[float, ...]] = []
    numbers: dict[str, int] = {}
    for pair in _pairs(source, found, mapping or {}, split, limit):
        key = f"row {len(values)}" if pair.prompt is None else f"prompt {prompt_text(pair.prompt)}"
        numbers.setdefault(key, len(numbers))
        values.append((*contrast(pair.chosen, pair.rejected), float(numbers[key])))
    if not found.rows:
        raise UsageError(f"{source}: no rows")
    if not values:
        raise UsageError(f"{source}: no row has a chosen and a rejected response ({_counted(found.left_out)})")
    table = np.array(values)
    found.values, found.prompts = table[:, :-1], table[:, -1].astype(np.int64)
    return found


def _pairs(source: str, found: Contrast, mapping: Mapping[str, str], split: str | None, limit: int | None) -> Iterator[Pair]:
    for where, raw in islice(read_rows(source, split), limit):
        row = renamed(raw, mapping, where)
        found.form = found.form or form_of(row, where, FORMS)
        require(row, FORMS[found.form], where)
        found.rows += 1
        pair = _pair(row, found.form, where)
        if isinstance(pair, str):
            found.left_out[pair] += 1
        else:
            yield pair


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())


# ---------------------------------------------------------------- table


def render(found: Sequence[Mapping[str, Any]], width: int = 100) -> str:
    """Two tables with a row a dataset, how far the responses differ and by what length; `found` are `as_dict`'s."""
    names = tables.short_names([result["name"] for result in found])
    differ = tables.new_table("dataset", "pairs", "Jaccard", "95 %", "median", "Levenshtein", "95 %", "median")
    length = tables.new_table("dataset", "/ length", "characters", "95 %", "words", "longer", "95 %", "identical")
    for name, result in zip(names, found, strict=True):
        own = result["metrics"]
        similarity, distance = own["jaccard"], own["levenshtein"]
        differ.add_row(
            name,
            str(result["pairs"]),
            *_cells(similarity, 3),
            _number(similarity["median"], 3),
            *_cells(distance, 0),
            _number(distance["median"], 0),
        )
        length.add_row(
            name,
            _number(own["levenshtein_normalised"]["value"], 3),
            *_cells(own["length_characters"], 0),
            _number(own["length_words"]["value"], 1),
            *_cells(own["longer"], 3),
            _number(own["identical"]["value"], 3),
        )
    notes = [
        f"{name}: {result['rows'] - result['pairs']} of {result['rows']} rows left out ({_counted(result['left_out'])})"
        for name, result in zip(names, found, strict=True)
        if result["left_out"]
    ]
    tail = [fill(line, width) for line in (LEGEND, *notes)]
    return "\n".join([tables.as_lines(differ, width), "", tables.as_lines(length, width), "", *tail])


def _cells(estimate: Mapping[str, Any], digits: int) -> tuple[str, str]:
    low, high = (_number(estimate[side], digits) for side in ("low", "high"))
    return _number(estimate["value"], digits), "–" if estimate["low"] is None else f"{low} to {high}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


# ---------------------------------------------------------------- plot

PANELS = {
    "jaccard": ("token Jaccard similarity", "#1f5fa8"),
    "levenshtein_normalised": ("Levenshtein / longer length", "#2e7d5b"),
    "levenshtein": ("Levenshtein, characters (log)", "#c2570c"),
}
"""Metric to the title and colour of its column in the plot."""


def check_plot(out: Path) -> None:
    """Raises: UsageError when a plot could not be written to `out`."""
    if out.suffix != ".svg":
        raise UsageError(f"{out}: the plot must end in .svg")
    if out.is_dir() or not out.parent.is_dir():
        raise UsageError(f"{out}: is a folder" if out.is_dir() else f"{out}: no such folder: {out.parent}")


def write_plot(out: Path, measured: Sequence[Contrast], found: Sequence[Mapping[str, Any]]) -> None:
    """Write the plot as SVG; the file appears whole or not at all."""
    with atomic(out) as temporary:
        temporary.write_bytes(plot(measured, found))


def plot(measured: Sequence[Contrast], found: Sequence[Mapping[str, Any]]) -> bytes:
    """A row a dataset and a column a metric: histograms with the mean, and its 95 % interval in grey, as SVG.

    All datasets share each column's axis and bins. Distances in characters have bins of equal width in logarithm, and one of
    their own for 0.
    """
    from io import BytesIO

    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    count = len(measured)
    figure, grid = plt.subplots(
        count, len(PANELS), figsize=(10, 1.1 + 1.25 * count), sharex="col", sharey="col", squeeze=False, layout="constrained"
    )
    names = tables.short_names([own.name for own in measured])
    for column, (metric, (title, colour)) in enumerate(PANELS.items()):
        edges = _edges(metric, measured)
        for axes, own, result in zip(grid[:, column], measured, found, strict=True):
            _histogram(axes, own.of(metric), edges, result["metrics"][metric], colour)
        if metric == "levenshtein":
            grid[-1, column].set_xscale("symlog", linthresh=1, linscale=0.4)
            grid[-1, column].xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
        grid[-1, column].set_xlim(edges[0], edges[-1])
        grid[-1, column].set_xlabel(title)
    for axes, name, own in zip(grid[:, 0], names, measured, strict=True):
        axes.set_ylabel(f"{_short(name)}\n{len(own.values):,} pairs", rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle("Contrast between chosen and rejected: share of the pairs, mean and its 95 % interval", fontsize=11)
    buffer = BytesIO()
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rlaif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()


def _edges(metric: str, measured: Sequence[Contrast]) -> Floats:
    if metric != "levenshtein":
        return np.linspace(0, 1, 21)
    most = max(float(own.of(metric).max()) for own in measured)
    # The last edge lies beyond the greatest distance, for a histogram's last bin would else be wider than it looks.
    return np.concatenate([[0.0], np.geomspace(1, max(most, 1) * 1.01 + 1, 25)])


def _histogram(axes: Any, values: Floats, edges: Floats, estimate: Mapping[str, Any], colour: str) -> None:
    counts, _ = np.histogram(values, edges)
    axes.stairs(counts / len(values), edges, fill=True, color=colour, alpha=0.35, lw=0)
    axes.stairs(counts / len(values), edges, color=colour, lw=1.2)
    if estimate["low"] is not None:
        axes.axvspan(estimate["low"], estimate["high"], color="#555555", alpha=0.25, lw=0)
    axes.axvline(estimate["value"], color="#222222", lw=1.2)
    late = estimate["value"] > edges[-4]  # its number would stand beyond the right edge
    axes.annotate(
        f"{estimate['value']:.{0 if estimate['value'] >= 10 else 2}f}",
        (estimate["value"], 1),
        xycoords=("data", "axes fraction"),
        xytext=(-3 if late else 3, -9),
        textcoords="offset points",
        ha="right" if late else "left",
        fontsize=8,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.margins(y=0.15)


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"…{name[-27:]}"


def compare(
    sources: Sequence[str],
    mapping: Mapping[str, str] | None = None,
    split: str | None = None,
    limit: int | None = None,
    resamples: int = 1000,
    seed: int = 0,
    out: Path | None = None,
) -> list[dict[str, Any]]:
    """Measure datasets and, where `out` is given, plot them. Raises: as `measure` does; and for a plot that cannot be."""
    if out:
        check_plot(out)
    measured = [measure(source, mapping, split, limit) for source in sources]
    found = [own.as_dict(resamples, seed) for own in measured]
    if out:
        write_plot(out, measured, found)
    return found


def as_json(found: Sequence[Mapping[str, Any]]) -> str:
    """What `compare` found, as JSON."""
    return json.dumps({"datasets": list(found)}, indent=2)
