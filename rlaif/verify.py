"""Verifiers: responses scored 1 or 0 by their final answer, or by a user's function, without a model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from numbers import Real
from typing import Any

from rlaif.data import Item
from rlaif.records import Row, RowError

Verifier = Callable[[Row], float]
"""The score of a row of `prompt` and `response`. Raises: RowError for a row that cannot be verified."""

MARK = re.compile(
    r"""\banswer\b[*_\s]*(?:is\b|[:=])[*_:\s]*
      | \\boxed\s*\{
      | (?<!\#)\#{4}[ \t]*(?=[-+$€£¥₹]?[\d.,/]+%?[ \t]*$ | \S.*\s*\Z)""",
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
"""What a final answer stands behind: `answer is`, `Answer:`, `\\boxed{` (MATH), and `####` (GSM8K), which is else a heading:
so before nothing but a number, or on the last line."""

NUMBER = re.compile(
    r"""(?<![\w.,])[-+]?
    (?: (?:\d+[ ])?\d+/\d+                                        # 3/4, 1 1/2
      | (?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d{1,3})?   # 12, 1,234.50, 1e-3
      | \.\d+ )
    (?!\d|[.,/:]\d)""",
    re.VERBOSE | re.IGNORECASE,
)
"""A number as people write it; no part of a date, a time or a list such as 1,2,3."""

LATEX = (
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\\(?:text|mathrm|mathbf)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,;!: ]"), ""),
    (re.compile(r"[$€£¥₹\\]"), ""),
)
DRESS = " \t\n*_`'\"“”‘’()[]{}<>.,;:!"
"""What may stand around an answer that is a text, and does not change it."""


def scored(item: Item, verifier: Verifier) -> Row:
    """The item's row with the columns of `rlaif score`: `status`, `score`, `scores`, `dispersion`, `votes`, `error`."""
    score, error = None, item.problem
    if error is None:
        try:
            score = verifier(item.row)
        except RowError as failure:
            error = str(failure)
    status, scores = ("ok", {"verifier": score}) if error is None else ("error", None)
    return {**item.row, "status": status, "score": score, "scores": scores, "dispersion": None, "votes": [], "error": error}


# ---------------------------------------------------------------- by the final answer


def by_answer(column: str, pattern: re.Pattern[str] | None = None) -> Verifier:
    """1 where the response's final answer is the row's reference answer in `column`, else 0, also where it has none.

    The final answer is the last match of `pattern` (its first group, where it has one), else what stands behind the last
    MARK, else, where the reference is a number, the last number. A reference may be a whole solution with such a mark, as
    GSM8K's and MATH's are. Numbers are equal by value; of what stands behind the mark the first one counts, of `3 + 4 = 7`
    what it comes to. Other answers are equal as texts, whatever their case, spaces and what stands around them.
    """

    def verify(row: Row) -> float:
        reference = _reference(row.get(column), column)
        marked = pattern_end(row["response"], pattern) if pattern else marked_end(row["response"])
        wanted = number(reference)
        if wanted is None:
            return float(marked is not None and _plain(marked) == _plain(reference))
        if marked is None and pattern is None:
            return float(_last_number(row["response"]) == wanted)
        return float(marked is not None and _first_number(marked) == wanted)

    return verify


def _reference(value: Any, column: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError(
            f"column '{column}': no reference answer" if value is None else f"column '{column}': neither text nor number"
        )
    text = str(value)
    marked = marked_end(text)
    text = text if marked is None else marked
    if not _plain(text):
        raise RowError(f"column '{column}': no reference answer")
    return text


def pattern_end(text: str, pattern: re.Pattern[str]) -> str | None:
    """The last match of a pattern: its first group, where it has one."""
    last = next(reversed(list(pattern.finditer(text))), None)
    return last and last.group(1 if pattern.groups else 0)


def marked_end(text: str) -> str | None:
    """What stands behind the last mark, up to the end of its line or of its braces; None without a mark.

    >>> marked_end("Answer: 3? No.\\n**Answer:** 4 apples"), marked_end(r"So \\boxed{\\frac{1}{2}}."), marked_end("It is 4.")
    ('4 apples', '\\\\frac{1}{2}', None)
    """
    last = next(reversed(list(MARK.finditer(text))), None)
    if last is None:
        return None
    rest = text[last.end() :]
    if last.group().endswith("{"):
        return rest[: _closing(rest)]
    return rest.partition("\n")[0].strip()


def _closing(text: str) -> int:
    """Where the brace closes that was open before the text; its end where none does."""
    depth = 1
    for place, sign in enumerate(text):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        if not depth:
            return place
    return len(text)


def number(text: str) -> Fraction | None:
    """The number that a text is, as a whole; None for anything else.

    >>> number("$1,234.50"), number("3/4."), number("-2 %"), number("12 apples")
    (Fraction(2469, 2), Fraction(3, 4), Fraction(-2, 1), None)
    """
    bare = _simple(text).strip(" *_%.")
    return _value(bare) if NUMBER.fullmatch(bare) else None


def _first_number(text: str) -> Fraction | None:
    text = _simple(text)
    sentence = re.split(r"[.;?!]\s", text)[0]
    found = NUMBER.search(sentence.rpartition("=")[2]) or NUMBER.search(text)
    return _value(found.group()) if found else None


def _last_number(text: str) -> Fraction | None:
    last = next(reversed(NUMBER.findall(_simple(text))), None)
    return last and _value(last)


def _value(text: str) -> Fraction | None:
    """The value of what NUMBER matches; None where it is none (3/0), or absurdly long."""
    whole, _, part = text.replace(",", "").rpartition(" ")
    try:
        if whole:  # 1 1/2
            return Fraction(whole) + (-1 if whole.startswith("-") else 1) * Fraction(part)
        return Fraction(part)
    except (ValueError, ZeroDivisionError):
        return None


def _simple(text: str) -> str:
    """Without currency signs and what LaTeX writes around numbers."""
    for pattern, instead in LATEX:
        text = pattern.sub(instead, text)
    return text.replace("−", "-")


def _plain(text: str) -> str:
    return " ".join(_simple(text).casefold().split()).strip(DRESS)


# ---------------------------------------------------------------- by a user's function


def by_function(function: Callable[[Any, str, Row], Any]) -> Verifier:
    """What a function of prompt, response and row says: true is 1 and false 0, or a finite number of its own.

    What it raises, or anything else that it gives, fails the row.
    """

    def verify(row: Row) -> float:
        try:
            found = function(row["prompt"], row["response"], dict(row))
        except Exception as error:  # it is its author's program
            raise RowError(f"the function failed: {type(error).__name__}: {error}") from error
        if not isinstance(found, Real):
            raise RowError(f"the function gave {found!r:.40}, a {type(found).__name__}, which is no number")
        try:
            score = float(found)
        except OverflowError:
            score = math.inf
        if not math.isfinite(score):
            raise RowError(f"the function gave {found!r:.40}, which is not finite")
        return score

    return verify
