"""Rows in and out: JSON lines, parquet, saved datasets and hub names; comparisons checked before anything is spent."""

from __future__ import annotations

import fcntl
import gzip
import json
import math
import os
import random
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar

from rlaif.records import RlaifError, Row, UsageError, digest

RESERVED = ("status", "soft_label", "label", "dispersion", "votes", "error")
RESERVED_SCORE = ("status", "score", "scores", "dispersion", "votes", "error")
RESERVED_SAMPLE = ("responses", "samples", "status", "error")
RESERVED_REVISE = ("revisions", "revised", "status", "error")
RESERVED_RANK = ("status", "ranking", "scores", "pairs", "cycles", "votes", "error")
"""Columns that a labelled, scored, sampled, revised or ranked file adds; an input that has one must rename it,
or it would be lost."""

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")

SURROGATE = re.compile("[\ud800-\udfff]")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Item:
    """One row to be judged: a comparison, a response, or a list of responses to rank.

    `row` is the input row with `id` and the columns of its kind filled in; `prompt` the same prompt as text; `where` says
    where the row stands, for messages; `problem` why it cannot be judged, or None.
    """

    row: Row
    prompt: str
    where: str
    problem: str | None


# ---------------------------------------------------------------- reading


def read_rows(source: str, split: str | None = None) -> Iterator[tuple[str, Row]]:
    """Rows of a `.jsonl`, `.jsonl.gz` or `.parquet` file, a saved dataset's folder or a hub name, each with its place.

    Raises: UsageError naming the file and the line or row, for what does not exist or cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        return _dataset_rows(source, split, saved=True)
    if source.endswith(SUFFIXES):
        if not path.exists():
            raise UsageError(f"no such file: {source}")
        if split:
            raise UsageError(f"{source} has no splits: --split goes with a saved dataset or a hub name")
        return _parquet_rows(path) if source.endswith(".parquet") else _jsonl_rows(path)
    if path.exists():
        raise UsageError(f"{source}: unknown file type; known: {', '.join(SUFFIXES)}, a saved dataset, a hub name")
    return _dataset_rows(source, split, saved=False)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Row]]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path} line {number}", _object(line, f"{path} line {number}")
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} after line {number}: cannot be read: {error}") from error


def _object(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise UsageError(f"{where}: expected a JSON object with named columns, got {kind_of(row)}")
    return row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:
        # Texts that are no UTF-8 and dates that are none, too.
        raise UsageError(f"{path} after row {number}: cannot be read as parquet: {' '.join(str(error).split())}") from error


def _dataset_rows(source: str, split: str | None, saved: bool) -> Iterator[tuple[str, Row]]:
    import datasets

    try:
        data = datasets.load_from_disk(source) if saved else datasets.load_dataset(source)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        kind = "a saved dataset" if saved else "a file, or a dataset that the hub gives"
        raise UsageError(f"{source} is not {kind}: {first}") from error
    if isinstance(data, dict):
        if split is None and len(data) > 1:
            raise UsageError(f"{source} has the splits {', '.join(data)}: choose one with --split")
        name = split or next(iter(data))
        if name not in data:
            raise UsageError(f"{source} has no split '{name}': it has {', '.join(data)}")
        data = data[name]
    elif split:
        raise UsageError(f"{source} has no splits: it is a single one")
    for number, row in enumerate(data, 1):
        yield f"{source} row {number}", dict(row)


def check_columns(row: Row, columns: Iterable[str], where: str, made_by: str) -> None:
    """Raises: UsageError naming the place and the column that the row lacks, and what would have made it."""
    for column in columns:
        if column not in row:
            raise UsageError(f"{where}: no column '{column}'; is this an output of {made_by}?")


# ---------------------------------------------------------------- comparisons


def comparisons(
    source: str,
    mapping: Mapping[str, str] | None = None,
    seed: int = 0,
    split: str | None = None,
    limit: int | None = None,
    reserved: tuple[str, ...] = RESERVED,
) -> Iterator[Item]:
    """Comparisons of a source in its order; `mapping` renames columns, as {new: old}.

    Rows hold `prompt`, `response_a`, `response_b`, or `chosen` and `rejected`: with a `prompt`, two responses; without,
    hh-rlhf's whole dialogues, split at the last assistant turn. Which of the two is shown as A is then drawn by `seed` and
    the row's content, and the column `human_label` tells which one was chosen.

    Raises: UsageError for a file that cannot be read, a missing column or one that the output would overwrite.
    """
    for number, where, row in _rows(source, mapping, split, limit, reserved):
        yield _comparison(row, number, where, seed)


def prompts(
    source: str, mapping: Mapping[str, str] | None = None, split: str | None = None, limit: int | None = None
) -> Iterator[Item]:
    """Prompts to be answered: rows of `prompt`. Raises: as `comparisons` does."""
    for number, where, row in _rows(source, mapping, split, limit, RESERVED_SAMPLE):
        yield _item(row, number, where, (), lambda row: None)


def responses(
    source: str,
    mapping: Mapping[str, str] | None = None,
    split: str | None = None,
    limit: int | None = None,
    reserved: tuple[str, ...] = RESERVED_SCORE,
) -> Iterator[Item]:
    """Responses to be rated or revised: rows of `prompt` and `response`, or of `prompt` and `responses`, each of which is
    then an item of its own, with the id ROW/INDEX. Raises: as `comparisons` does.
    """
    for number, where, row in _rows(source, mapping, split, limit, reserved):
        if "response" in row or "responses" not in row:
            yield _item(row, number, where, ("response",), lambda row: _text_problem(row, "response"))
            continue
        texts = row["responses"] if isinstance(row["responses"], list) else [row["responses"]]
        rest = {name: value for name, value in row.items() if name != "responses"}
        whole = number if row.get("id") is None else row["id"]
        for index, text in enumerate(texts):
            one = {**rest, "id": f"{whole}/{index}", "response": text}
            yield _item(one, number, where, ("response",), lambda row: _text_problem(row, "response"))


def response_lists(
    source: str, mapping: Mapping[str, str] | None = None, split: str | None = None, limit: int | None = None
) -> Iterator[Item]:
    """Lists of responses to be ranked: rows of `prompt` and `responses`. Raises: as `comparisons` does."""
    for number, where, row in _rows(source, mapping, split, limit, RESERVED_RANK):
        yield _item(row, number, where, ("responses",), _list_problem)


def _rows(
    source: str, mapping: Mapping[str, str] | None, split: str | None, limit: int | None, reserved: tuple[str, ...]
) -> Iterator[tuple[int, str, Row]]:
    for number, (where, raw) in enumerate(islice(read_rows(source, split), limit)):
        row = renamed(_resumed(raw), mapping or {}, where)
        taken = [name for name in reserved if name in row]
        if taken:
            raise UsageError(
                f"{where}: column '{taken[0]}' is one that the output adds; rename it, as with --map my_{taken[0]}={taken[0]}"
            )
        yield number, where, row


def _resumed(row: Row) -> Row:
    """A row that `rlaif sample` made, as the input of what comes next: its draws and their status stay behind in its file.

    One that failed has null for `responses`, which is no list of texts.
    """
    return {k: v for k, v in row.items() if k not in ("samples", "status", "error")} if "samples" in row else row


def check(items: Iterable[Item], source: str) -> tuple[int, list[str]]:
    """Count the rows and list the problems of those that cannot be judged.

    Raises: UsageError when there are no rows at all.
    """
    count, problems = 0, []
    for item in items:
        count += 1
        if item.problem:
            problems.append(f"{item.where}: {item.problem}")
    if not count:
        raise UsageError(f"{source}: no rows")
    return count, problems


def renamed(row: Row, mapping: Mapping[str, str], where: str) -> Row:
    """The row with other column names, {new: old}. Raises: UsageError for a column that is missing, or would be lost."""
    if not mapping:
        return row
    for new, old in mapping.items():
        if old not in row:
            raise UsageError(f"{where}: --map {new}={old}: no column '{old}'; there are: {', '.join(row)}")
        if new in row and new not in mapping.values():
            raise UsageError(f"{where}: --map {new}={old}: column '{new}' is there already and would be lost")
    names = {old: new for new, old in mapping.items()}
    if len(names) < len(mapping):
        twice = next(new for new, old in mapping.items() if names[old] != new)
        raise UsageError(f"--map {twice}={mapping[twice]}: column '{mapping[twice]}' is renamed twice")
    return {names.get(name, name): value for name, value in row.items()}


def _comparison(row: Row, number: int, where: str, seed: int) -> Item:
    problem = None
    if "response_a" not in row and "response_b" not in row and "chosen" in row and "rejected" in row:
        row, problem = _from_preference(row, seed)
    return _item(row, number, where, ("response_a", "response_b"), _pair_problem, problem)


def _item(
    row: Row,
    number: int,
    where: str,
    columns: tuple[str, ...],
    problem: Callable[[Row], str | None],
    known: str | None = None,
) -> Item:
    for name in ("prompt", *columns):
        if name not in row:
            raise UsageError(f"{where}: no column '{name}'; there are: {', '.join(row)} (rename with --map {name}=COLUMN)")
    row = {"id": str(number) if row.get("id") is None else row["id"], **{k: v for k, v in row.items() if k != "id"}}
    prompt = as_text(row["prompt"])
    return Item(row, prompt or "", where, known or _prompt_problem(row, prompt) or problem(row))


def _prompt_problem(row: Row, prompt: str | None) -> str | None:
    if prompt is None:
        return f"column 'prompt': expected text or messages, got {kind_of(row['prompt'])}"
    return None if prompt.strip() else "column 'prompt' is empty"


def _text_problem(row: Row, name: str) -> str | None:
    if not isinstance(row[name], str):
        return f"column '{name}': expected text, got {kind_of(row[name])}"
    return None if row[name].strip() else f"column '{name}' is empty"


def _pair_problem(row: Row) -> str | None:
    problem = _text_problem(row, "response_a") or _text_problem(row, "response_b")
    if problem is None and row["response_a"] == row["response_b"]:
        return "columns 'response_a' and 'response_b' are identical: there is nothing to compare"
    return problem


def _list_problem(row: Row) -> str | None:
    texts = row["responses"]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return f"column 'responses': expected a list of texts, got {kind_of(texts)}"
    if len(texts) < 2:
        return f"column 'responses': {len(texts)} response{'s' * (len(texts) != 1)}: there is nothing to rank"
    empty = next((n for n, text in enumerate(texts) if not text.strip()), None)
    if empty is not None:
        return f"column 'responses': the one at index {empty} is empty"
    twice = next((n for n, text in enumerate(texts) if text in texts[:n]), None)
    return None if twice is None else f"column 'responses': the one at index {twice} is there twice"


def kind_of(value: Any) -> str:
    """What a JSON value is, in words for a message."""
    names = {
        type(None): "null",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        dict: "an object",
    }
    return names.get(type(value), "a list" if isinstance(value, list) else type(value).__name__)


def _from_preference(row: Row, seed: int) -> tuple[Row, str | None]:
    """The row with `prompt`, `response_a`, `response_b`, `human_label` taken from `chosen` and `rejected`."""
    first, chosen = split_response(row["chosen"], row.get("prompt"))
    second, rejected = split_response(row["rejected"], row.get("prompt"))
    problem = None
    for name, response in (("rejected", rejected), ("chosen", chosen)):
        if response is None:
            expected = "a dialogue" if row.get("prompt") is None else "text, or messages"
            problem = f"column '{name}': expected {expected} ending with an assistant turn, got {kind_of(row[name])}"
        elif not response.strip():
            problem = f"column '{name}': the response is empty"
    if problem is None and first != second:
        problem = "columns 'chosen' and 'rejected' differ before the last assistant turn: they answer different prompts"
    elif problem is None and chosen == rejected:
        problem = "columns 'chosen' and 'rejected' are identical: there is nothing to compare"
    chosen_is_a = random.Random(digest([seed, row["chosen"], row["rejected"]])).random() < 0.5
    a, b = (chosen, rejected) if chosen_is_a else (rejected, chosen)
    human = {} if "human_label" in row else {"human_label": "a" if chosen_is_a else "b"}
    return {**row, "prompt": first, "response_a": a, "response_b": b, **human}, problem


def split_response(answer: Any, prompt: Any) -> tuple[Any, str | None]:
    """(prompt, response) of one side: a response where there is a prompt, else the dialogue's last assistant turn."""
    if isinstance(answer, list) and answer and all(isinstance(m, dict) for m in answer):
        last = answer[-1]
        if last.get("role") != "assistant" or not isinstance(last.get("content"), str):
            return prompt, None
        return answer[:-1] if prompt is None else prompt, last["content"]
    if not isinstance(answer, str):
        return prompt, None
    if prompt is not None:
        return prompt, answer
    head, mark, tail = answer.rpartition(ASSISTANT)
    return (head.strip(), tail.strip()) if mark else (None, None)


# ---------------------------------------------------------------- dialogues

SYSTEM, HUMAN, ASSISTANT = "System:", "\n\nHuman:", "\n\nAssistant:"


def as_text(prompt: Any) -> str | None:
    """A prompt as text: messages become an hh-rlhf dialogue; None for what is neither text nor messages.

    >>> as_text([{"role": "user", "content": "Hi"}])
    'Hi'
    >>> as_text([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}])
    'Human: Hi\\n\\nAssistant: Yes?'
    """
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list) or not all(
        isinstance(m, dict) and isinstance(m.get("content"), str) and isinstance(m.get("role"), str) for m in prompt
    ):
        return None
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return str(prompt[0]["content"])
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    return "\n\n".join(f"{names.get(m['role'], m['role'])}: {m['content']}" for m in prompt)


def is_dialogue(text: str) -> bool:
    """Whether a text is an hh-rlhf dialogue: a human's turn first, or after what `as_text` makes of a system message.

    >>> is_dialogue("Human: Hi"), is_dialogue("System: Be brief.\\n\\nHuman: Hi"), is_dialogue("Hi\\n\\nHuman: Hi")
    (True, True, False)
    """
    text = text.lstrip()
    return text.startswith(HUMAN.strip()) or (text.startswith(SYSTEM) and HUMAN in text)


def as_messages(prompt: Any) -> list[dict[str, str]]:
    """A prompt as messages: an hh-rlhf dialogue becomes its turns, other text one user turn.

    >>> [m["role"] for m in as_messages("Human: Hi\\n\\nAssistant: Yes?\\n\\nHuman: Go on")]
    ['user', 'assistant', 'user']
    >>> as_messages("Hi")
    [{'role': 'user', 'content': 'Hi'}]
    """
    if isinstance(prompt, list):
        return [{"role": m["role"], "content": m["content"]} for m in prompt]
    if not is_dialogue(str(prompt)):
        return [{"role": "user", "content": str(prompt)}]
    before, *parts = ("\n\n" + str(prompt).strip()).split(HUMAN)
    turns = [{"role": "system", "content": before.strip().removeprefix(SYSTEM).strip()}] if before else []
    for part in parts:
        user, *answers = part.split(ASSISTANT)
        turns.append({"role": "user", "content": user.strip()})
        turns += [{"role": "assistant", "content": answer.strip()} for answer in answers]
    return turns


# ---------------------------------------------------------------- writing


def run_path(out: Path) -> Path:
    """Where the run file of an output stands: settings, versions, counts and cost."""
    return out.with_name(out.name + ".run.json")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place only when the block ends well.

    Raises: RlaifError naming `path`, where it cannot be written (a full disk, a closed folder).
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise RlaifError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextmanager
def held(folder: Path, lock: str, busy: str) -> Iterator[None]:
    """Make a folder where there is none, and keep other processes from it; the end of this one frees it, however it ends.

    Raises: UsageError where another process has it, which `busy` says, or it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / lock).open("w")
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written to: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{folder}: {busy}") from None
        yield


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_output(out: Path) -> None:
    """Raises: UsageError when rows could not be written to `out`: its ending is unknown, or its folder missing or closed."""
    if not out.name.endswith(SUFFIXES):
        raise UsageError(f"{out}: the output must end in {', '.join(SUFFIXES)}")
    if out.is_dir():
        raise UsageError(f"{out}: is a folder")
    if run_path(out).is_dir():
        raise UsageError(f"{run_path(out)}: a folder is in the way")
    if not out.parent.is_dir():
        raise UsageError(f"{out}: no such folder: {out.parent}")
    if not os.access(out.parent, os.W_OK):
        raise UsageError(f"{out}: the folder {out.parent} cannot be written to")


def write_rows(out: Path, rows: Callable[[], Iterable[Row]]) -> None:
    """Write rows to a `.jsonl`, `.jsonl.gz` or `.parquet` file that appears whole or not at all.

    `rows` is called once for JSON lines, twice for parquet (first to learn the columns' types).
    """
    with atomic(out) as temporary:
        if out.name.endswith(".parquet"):
            _write_parquet(temporary, rows)
        else:
            with gzip.open(temporary, "wb") if out.name.endswith(".gz") else temporary.open("wb") as file:
                _write_jsonl(file, rows())


def _write_jsonl(file: IO[bytes] | gzip.GzipFile, rows: Iterable[Row]) -> None:
    for row in rows:
        try:
            text = json.dumps(row, ensure_ascii=False, allow_nan=False, default=str)
        except ValueError:
            text = json.dumps(_finite(row), ensure_ascii=False, default=str)
        file.write(text.encode("utf-8", "backslashreplace") + b"\n")


def _finite(value: Any) -> Any:
    """The value with null for NaN and infinity, which JSON has not."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


def _write_parquet(path: Path, rows: Callable[[], Iterable[Row]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = parquet_schema(rows())
    done = 0
    with pq.ParquetWriter(path, schema) as writer:
        for chunk in chunks(map(_encodable, rows()), 1000):
            columns = [_column(field.name, chunk, done, field.type) for field in schema]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
            done += len(chunk)


def parquet_schema(rows: Iterable[Row]) -> Any:
    """The columns and types that hold all rows.

    Raises: UsageError when a column mixes types that no parquet type holds.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([])
    done = 0
    for chunk in chunks(map(_encodable, rows), 1000):
        for name in {name: None for row in chunk for name in row}:
            found = pa.schema([pa.field(name, _column(name, chunk, done).type)])
            try:
                schema = pa.unify_schemas([schema, found], promote_options="permissive")
            except pa.ArrowException as error:
                raise _no_type(name, done, len(chunk), error) from error
        done += len(chunk)
    try:
        pq.ParquetWriter(pa.BufferOutputStream(), schema).close()
    except pa.ArrowException as error:  # an object that is empty in every row
        raise UsageError(f"no parquet file can hold these columns: {error}") from error
    return schema


def _column(name: str, chunk: list[Row], done: int, kind: Any = None) -> Any:
    import pyarrow as pa

    try:
        return pa.array([row.get(name) for row in chunk], kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise _no_type(name, done, len(chunk), error) from error


def _no_type(name: str, done: int, count: int, error: Exception) -> UsageError:
    return UsageError(f"column '{name}', rows {done + 1} to {done + count}: no parquet type holds all its values: {error}")


def _encodable(value: Any) -> Any:
    """The value with U+FFFD for each lone surrogate, which parquet's UTF-8 cannot hold."""
    if isinstance(value, str):
        return SURROGATE.sub("\ufffd", value)
    if isinstance(value, Mapping):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_encodable(item) for item in value]
    return value


def chunks(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, size)):
        yield chunk
