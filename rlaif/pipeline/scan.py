"""What must not leave this machine: secrets, and names of its folders. Looked for in files before they are sent anywhere."""

from __future__ import annotations

import gzip
import html
import json
import os
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rlaif.data import read_rows
from rlaif.records import UsageError

SECRETS = {
    "a key (sk-…)": r"sk-(?:(?<![A-Za-z0-9]sk-)|(?=[\w-]*\d)(?=[\w-]*[A-Z]))[\w-]{20,}",  # not "risk-adjusted-…"
    "a token of the hub (hf_…)": r"hf_[A-Za-z0-9]{20,}",
    "a token of GitHub (ghp_…)": r"gh[pousr]_[A-Za-z0-9]{20,}",
    "a token of GitHub (github_pat_…)": r"github_pat_\w{20,}",
    "a key of AWS (AKIA…)": r"A[KS]IA[A-Z0-9]{16}",
    "a key of Google (AIza…)": r"AIza[\w-]{30,}",
    "a token of Slack (xox…)": r"xox[a-z]-[A-Za-z0-9-]{10,}",
    "a private key (PEM)": r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY",
    "a bearer token": r"[Bb]earer\s+[\w.~+/-]{16,}=*",
    "a JSON web token": r"eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*",
}
"""Kinds of secrets, in words, and how they look."""

PATTERNS = {kind: re.compile(pattern, re.ASCII) for kind, pattern in SECRETS.items()}

NAMED = re.compile("KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
SHORTEST = 8
"""Names of environment variables that hold secrets; shorter values are words or numbers."""

PATH = re.compile(
    r"file://[^\s\"'`<>|]+"
    r"|(?<![\w/.)\]~<>}*])(?:/[\w.@+~-]+){2,}"
    r"|(?<![^\s\"'`=(,|:])/[\w.@+~-]{2,}(?![^\s\"'`),|;])"
    r"|(?<![A-Za-z0-9])[A-Za-z]:[\\/]{1,2}\w[^\s\"'`<>|]*"
)
"""An absolute path: of two names or more, or one by itself. `https://host/a`, `and/or`, `</s>` and `[/INST]` are none."""

BEFORE = r"(?<![\w.~<>)\]}])"
"""What a path of one name does not stand after, being a part of something else there (`../tmp`, `</root>`)."""

PEOPLES = (
    BEFORE + r"(?:/mnt)?(?:/[A-Za-z])?/(?:home|Users)/\w(?:[\w.-]*\w)?",
    r"(?i:(?<![a-z0-9])[a-z]:[\\/]{1,2}Users[\\/]{1,2}\w(?:[\w.-]*\w)?)",
    BEFORE + r"/root(?![\w-])",
)
"""Folders of people, on any machine."""

GOES_ON = r"(?=[\\/]+\w)"
"""In a vocabulary, `/tmp` is a word; `/tmp/x` is in none but by accident."""

JSON = (".json", ".jsonl", ".jsonl.gz", ".parquet", ".safetensors")
OTHER = (".md", ".txt", ".yaml", ".yml", ".jinja", ".py")
BINARY = (".model", ".spm", ".tiktoken")
"""Files that can be looked through; those of BINARY are tokenizers."""

VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json", "merges.txt", "vocab.txt", *BINARY)
METADATA = (".json", ".safetensors", ".md", ".yaml", ".yml")

ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))")
CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}


@dataclass(frozen=True)
class Found:
    """`where`: the file's name and line; `kind`: in words; `text`: what was found, which is told of paths alone."""

    where: str
    kind: str
    text: str
    secret: bool

    def __str__(self) -> str:
        return f"{self.where}: {self.kind}" + ("" if self.secret else f" {self.text}")


@dataclass
class Scanner:
    """Looks through files. `secrets`: values to their names, in words; `places`: this machine's folders that none may name."""

    secrets: Mapping[str, str]
    places: Iterable[str]
    allow: Collection[str] = ()
    _people: re.Pattern[str] = field(init=False)
    _words: re.Pattern[str] = field(init=False)

    def __post_init__(self) -> None:
        own = [_own(place) for place in sorted(self.places, key=len, reverse=True)]
        self._people = re.compile("|".join((*own, *PEOPLES)))
        self._words = re.compile("|".join(one + GOES_ON for one in (*own, *PEOPLES)))

    def file(self, path: Path, name: str) -> Iterator[Found]:
        """All that is in a file, known by `name`, and in that name, but for what is allowed.

        Raises: UsageError for a file that cannot be looked through.
        """
        if any(True for _ in self.text("", name)):
            raise UsageError(f"a file is named as a secret or a folder of this machine: {self.masked(name)}")
        for place, line in _lines(path, name):
            yield from self.text(name, line, f"{name} {place}")

    def text(self, name: str, line: str, where: str = "") -> Iterator[Found]:
        """What is in a line of a file of this name."""
        read = unescaped(line) if name.endswith(JSON) else html.unescape(line) if name.endswith(".md") else line
        every = (*self._secrets(line, where), *self._secrets(read, where), *self._paths(name, read, where))
        yield from (found for found in dict.fromkeys(every) if found.text not in self.allow)

    def masked(self, text: str) -> str:
        """The text without the secrets in it."""
        for value in sorted(self.secrets, key=len, reverse=True):
            text = text.replace(value, "…")
        for pattern in PATTERNS.values():
            text = pattern.sub("…", text)
        return text

    def _secrets(self, line: str, where: str) -> Iterator[Found]:
        for value, whose in self.secrets.items():
            if value in line:
                yield Found(where, whose, value, True)
        for kind, pattern in PATTERNS.items():
            for match in pattern.finditer(line):
                yield Found(where, kind, match[0], True)

    def _paths(self, name: str, line: str, where: str) -> Iterator[Found]:
        if "/" not in line and "\\" not in line:
            return
        vocabulary = name.endswith(VOCABULARIES)
        for match in (self._words if vocabulary else self._people).finditer(line):
            yield self._path(where, "a folder of this machine or of a person:", match[0])
        if name.endswith(METADATA) and not vocabulary:
            for match in PATH.finditer(line):
                yield self._path(where, "an absolute path:", match[0])

    def _path(self, where: str, kind: str, text: str) -> Found:
        return Found(where, kind, text, secret=self.masked(text) != text)


def _own(place: str) -> str:
    """A folder of this machine; one of a single name may be a part of some other path."""
    whole = re.escape(place).replace(r"\\", r"[\\/]{1,2}")
    return (BEFORE if place.count("/") + place.count("\\") < 2 else "") + whole + r"(?![\w-])"


def here(*folders: Path) -> set[str]:
    """The names of folders that tell of this machine: the user's, the one worked in, the one for temporary files, and these."""
    known = (Path.home(), Path.cwd(), Path(tempfile.gettempdir()), *folders)
    names = {str(own) for path in known for own in (path.absolute(), path.resolve())}
    return {name for name in names if name != Path(name).anchor}


def of_environment(**more: str | None) -> dict[str, str]:
    """Secrets of this process, to what they are in words: values of variables that are named so, and `more`. Line by line."""
    found: dict[str, str] = {}
    named = {name: value for name, value in os.environ.items() if NAMED.search(name)}
    for name, value in {**named, **more}.items():
        for line in (value or "").splitlines():
            if len(line.strip()) >= SHORTEST:
                found[line.strip()] = f"the value of {name.replace('_', ' ') if name in more else name}"
    return found


# ---------------------------------------------------------------- reading


def unescaped(line: str) -> str:
    r"""A line of JSON as what its texts say.

    >>> unescaped(r'{"a": "C:\\b\u002fc"}')
    '{"a": "C:\\b/c"}'
    """
    if "\\" not in line:
        return line
    text = ESCAPE.sub(lambda match: chr(int(match[1], 16)) if match[1] else CONTROLS.get(match[2], match[2]), line)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # two halves make a character


def _lines(path: Path, name: str) -> Iterator[tuple[str, str]]:
    """Where each line stands, and the line. Raises: UsageError for what is no text."""
    if name.endswith(".parquet"):
        yield from _parquet(path)
    elif name.endswith(".safetensors"):
        yield "header", _header(path, name)
    else:
        with gzip.open(path, "rb") if name.endswith(".gz") else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield f"line {number}", _decoded(line, name, number)


def _decoded(line: bytes, name: str, number: int) -> str:
    if name.endswith(BINARY):
        return line.decode("latin-1")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UsageError(f"{name} line {number}: is no text in UTF-8, so it cannot be looked through for secrets")
    return text


def _parquet(path: Path) -> Iterator[tuple[str, str]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        yield "schema", file.schema_arrow.to_string(truncate_metadata=False)
    for number, (_, row) in enumerate(read_rows(str(path)), 1):
        yield f"row {number}", json.dumps(row, ensure_ascii=False, default=str)


def _header(path: Path, name: str) -> str:
    """What a safetensors file says beside its numbers."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size - 8:
            raise UsageError(f"{name}: is no safetensors file")
        return _decoded(file.read(size), name, 1)
