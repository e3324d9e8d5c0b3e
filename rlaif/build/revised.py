"""Training sets from revisions: constitutional AI's supervised stage, and CLAIR's contrastive pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rlaif.build.rows import Build, answers, drawn, usable, written
from rlaif.records import LABELLED, Row, UsageError


def sl_cai(
    rows: Iterable[Row],
    build: Build,
    rounds: int | None = None,
    drop_unchanged: bool = False,
    drop_refusals: bool = False,
) -> Iterator[Row]:
    """Constitutional AI's supervised stage (Bai et al., arXiv 2212.08073, §3): the revisions of all rounds, as answers.

    `id`, `prompt`, `completion`, `source` ("round 2"). `rounds`: only those of the first so many. Revisions that change
    nothing and ones that decline are kept unless told otherwise. Of a row that ended early, the rounds before count.
    """
    for row in rows:
        whole = {**row, "status": "ok"} if row["revisions"] else row
        if not usable(whole, build, "revisions"):
            continue
        for entry in row["revisions"]:
            reason = _left_out(entry, row, rounds, drop_unchanged, drop_refusals)
            if reason:
                build.dropped[reason] += 1
                continue
            example = written(build, f"{row['id']}/{entry['round']}", row["prompt"], completion=entry["revision"])
            yield {**example, "source": f"round {entry['round']}"}


def _left_out(entry: Row, row: Row, rounds: int | None, drop_unchanged: bool, drop_refusals: bool) -> str | None:
    if not isinstance(entry, dict) or not {"round", "revision", "status"} <= entry.keys():
        raise UsageError(f"row '{row['id']}': column 'revisions': an entry without round, revision or status")
    if entry["status"] not in LABELLED or not entry["revision"]:
        return f"{entry['status']} revisions"
    if rounds is not None and entry["round"] > rounds:
        return "revisions of later rounds"
    if drop_unchanged and entry.get("unchanged"):
        return "unchanged revisions"
    return "revisions that decline" if drop_refusals and entry.get("refusal") else None


def with_helpful(examples: list[Row], mix: Sequence[Row], build: Build, ratio: float = 1.0) -> list[Row]:
    """The revisions, and after them `ratio` helpfulness samples for each, as the paper mixes them in to keep the model helpful.

    Raises: RlaifError where there are too few.
    """
    found = [
        {**written(build, f"mix/{name}/{n}", row["prompt"], completion=text), "source": "mix"}
        for row, name, texts in answers(mix, build, " in the mix")
        for n, text in enumerate(texts)
    ]
    return examples + drawn(found, ratio, len(examples), "helpfulness samples", build)


def clair(rows: Iterable[Row], build: Build) -> Iterator[Row]:
    """CLAIR (D'Oosterlinck et al., arXiv 2408.06266): a minimal revision is chosen, the response it revises rejected.

    `id`, `prompt`, `chosen`, `rejected`. Of several rounds the last one's text is taken, where the paper has one round.
    Revisions that are the response word for word are left out, as nothing can be learnt from them.
    """
    for row in rows:
        if not usable(row, build, "response", "revised"):
            continue
        if row["revised"].strip() == row["response"].strip():
            build.dropped["unchanged"] += 1
            continue
        yield written(build, row["id"], row["prompt"], chosen=row["revised"], rejected=row["response"])
