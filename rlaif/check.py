"""Contamination and quality of a training set, of any of the shapes that TRL's trainers take.

Near-duplicates are found as Broder (On the resemblance and containment of documents, 1997) and Lee et al. (Deduplicating
Training Data Makes Language Models Better, arXiv 2107.06499) find them: MinHash and locality-sensitive hashing over word
5-grams give candidates, whose exact Jaccard similarity then decides. N-gram containment of evaluation prompts is that of PaLM
(arXiv 2204.02311, §8), which took a test example whose 8-grams were to 70 % in the training set for contaminated.
"""

from __future__ import annotations

import json
import math
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import islice
from textwrap import fill
from typing import Any

import numpy as np
import numpy.typing as npt
from datasketch import MinHash, MinHashLSH

from rlaif.contrast import WORD, form_of, preference, prompt_of, prompt_text, require, response
from rlaif.data import SURROGATE, as_text, kind_of, read_rows
from rlaif.evaluate import tables
from rlaif.evaluate.agreement import estimates, share
from rlaif.records import RlaifError, Row, UsageError

Words = npt.NDArray[np.uint64]

FORMS = {
    "preference": ("chosen", "rejected"),
    "completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}
EVALUATION_FORMS = {"prompt": ("prompt",), "preference": ("chosen", "rejected"), "messages": ("messages",), "text": ("text",)}
"""What rows may hold, the first that fits a file's first row, and the columns that each row then must have."""

SHINGLE = 5
"""Words of a shingle, what near-duplicates have in common; a shorter text is one shingle."""

PERMUTATIONS = 64
RECALL = 0.98
"""Of a MinHash, and the least chance that its bands find a pair whose similarity is just the threshold."""

CROWD = 100
"""So many candidates that are no near-duplicates, and a text is not indexed: a template would make work grow as rows squared.

So many evaluation prompts, and an n-gram that is in more of them is a template's, which says nothing of contamination."""

BATCH = 256
EXAMPLES = 3

MEASURES = {
    "duplicates": "exact duplicates",
    "near": "near-duplicates",
    "overlap": "evaluation overlap",
    "overlap_exact": "… the same prompt",
    "overlap_near": "… a near-duplicate",
    "overlap_ngrams": "… its n-grams",
    "evaluation_met": "evaluation prompts met",
    "empty": "an empty side",
    "different_prompts": "sides of different prompts",
    "identical": "chosen = rejected",
    "over_length": "over the length",
    "label_true": "label true",
    "imbalance": "the more frequent label",
    "longer": "the longer is chosen",
}
"""Measure to its name in the table, in its order; each is a share."""


# ---------------------------------------------------------------- rows


@dataclass(frozen=True, slots=True)
class Example:
    """One training row as texts: `prompt` is None where none is told apart from the answer, `answers` are chosen and rejected,
    or the only one. `same_prompt`: both sides of a preference go on from one prompt.
    """

    where: str
    prompt: str | None
    answers: tuple[str, ...]
    label: bool | None = None
    soft_label: float | None = None
    same_prompt: bool = True


def training_rows(source: str, forms: Mapping[str, tuple[str, ...]] = FORMS) -> Iterator[tuple[str, Example]]:
    """Each row's form (that of the first) and texts. Raises: UsageError naming file, line and column for what is neither."""
    form = ""
    for where, row in read_rows(source):
        form = form or form_of(row, where, forms)
        require(row, forms[form], where)
        yield form, _example(row, form, where)


def _example(row: Row, form: str, where: str) -> Example:
    if form == "prompt":
        if row["prompt"] is None:
            raise UsageError(f"{where}: column 'prompt': expected text or messages, got null")
        return Example(where, prompt_text(prompt_of(row, where)), ())
    if form == "preference":
        return _preference(row, where)
    if form == "completion":
        prompt, answer = response(row, "completion", where)
        if row["prompt"] is None:
            raise UsageError(f"{where}: column 'prompt': expected text or messages, got null")
        return Example(where, prompt_text(prompt), (answer,), label=_label(row, where))
    return _messages(row, where) if form == "messages" else _plain(row, where)


def _preference(row: Row, where: str) -> Example:
    soft = _soft_label(row, where)
    pair = preference(row, where)
    if pair:
        prompt = None if pair.prompt is None else prompt_text(pair.prompt)
        return Example(where, prompt, (pair.chosen, pair.rejected), soft_label=soft)
    prompt, chosen = response(row, "chosen", where)
    _, rejected = response(row, "rejected", where)
    return Example(where, None if prompt is None else prompt_text(prompt), (chosen, rejected), None, soft, same_prompt=False)


def _messages(row: Row, where: str) -> Example:
    """A conversation: its last assistant turn is the answer, which is missing where another turn comes last."""
    messages = row["messages"]
    if not isinstance(messages, list) or not messages or as_text(messages) is None:
        raise UsageError(f"{where}: column 'messages': expected messages with a role and a text, got {kind_of(messages)}")
    *before, last = messages
    if last["role"] != "assistant":
        return Example(where, prompt_text(messages), ("",))
    return Example(where, prompt_text(before) if before else None, (last["content"].strip(),))


def _plain(row: Row, where: str) -> Example:
    """A text; an hh-rlhf dialogue is split at its last assistant turn."""
    if not isinstance(row["text"], str):
        raise UsageError(f"{where}: column 'text': expected text, got {kind_of(row['text'])}")
    prompt, answer = response({"text": row["text"]}, "text", where)
    return Example(where, None if prompt is None else prompt_text(prompt), (answer,))


def _label(row: Row, where: str) -> bool | None:
    if "label" not in row:
        return None
    if not isinstance(row["label"], bool):
        raise UsageError(f"{where}: column 'label': expected true or false, got {row['label']!r}")
    return bool(row["label"])


def _soft_label(row: Row, where: str) -> float | None:
    if "soft_label" not in row:
        return None
    soft = row["soft_label"]
    if isinstance(soft, bool) or not isinstance(soft, int | float) or not 0 <= soft <= 1:
        raise UsageError(f"{where}: column 'soft_label': {soft!r} is not a probability")
    return float(soft)


# ---------------------------------------------------------------- texts as sets


def normalised(text: str) -> str:
    """The text in lower case, with one blank for each run of white space, and none around it."""
    return " ".join(text.lower().split())


def fingerprint(parts: Iterable[str | None]) -> bytes:
    """16 bytes of BLAKE2 that tell normalised texts apart."""
    text = json.dumps([None if part is None else normalised(part) for part in parts])
    return blake2b(text.encode(), digest_size=16).digest()


class Shingler:
    """Texts as sets of word n-grams: 64-bit hashes, of which two of different n-grams are the same once in 10^19 pairs.

    Words are as `contrast.words` has them, and numbered as they come: the memory grows with the vocabulary.
    """

    def __init__(self) -> None:
        self._numbers: defaultdict[str, int] = defaultdict()
        self._numbers.default_factory = self._numbers.__len__
        self._weights = np.random.default_rng(0).integers(0, 1 << 63, 256, dtype=np.uint64) * np.uint64(2) + np.uint64(1)

    def numbers(self, text: str) -> Words:
        """The text's words, as numbers that are spread over 64 bits."""
        found = WORD.findall(text.lower())
        return _mixed(np.fromiter(map(self._numbers.__getitem__, found), np.uint64, len(found)))

    def ngrams(self, words: Words, size: int) -> Words:
        """Sorted and distinct hashes of the n-grams of `size` words; empty where there are fewer."""
        count = len(words) - size + 1
        if count < 1:
            return words[:0]
        total = np.zeros(count, dtype=np.uint64)
        for place in range(size):
            total += words[place : place + count] * self._weights[place]
        return np.unique(_mixed(total))

    def shingled(self, words: Words) -> Words:
        """The shingles of one text's words; of fewer than `SHINGLE`, the one of them all."""
        return self.ngrams(words, min(SHINGLE, len(words)) or 1)

    def shingles(self, texts: Iterable[str | None]) -> Words:
        """The shingles of all texts together, none of which reaches from one text into the next."""
        sets = [self.shingled(self.numbers(text)) for text in texts if text]
        return (sets[0] if len(sets) == 1 else np.unique(np.concatenate(sets))) if sets else np.empty(0, dtype=np.uint64)


def _mixed(values: Words) -> Words:
    """SplitMix64's finaliser (Steele et al., 2014), a bijection: neighbours become far apart."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def similarity(first: Words, second: Words) -> float:
    """|A ∩ B| / |A ∪ B| of two sorted sets that are not both empty."""
    common = len(np.intersect1d(first, second, assume_unique=True))
    return common / (len(first) + len(second) - common)


def bands(near: float) -> tuple[int, int]:
    """How many bands of how many hashes: the longest that still find a pair of similarity `near` by the chance `RECALL`."""
    for size in range(PERMUTATIONS // 2, 1, -1):
        count = PERMUTATIONS // size
        if 1 - (1 - near**size) ** count >= RECALL:
            return count, size
    return PERMUTATIONS, 1


class NearIndex:
    """Sets of shingles, to be found again by others whose Jaccard similarity is `near` or more.

    A set that `CROWD` others look like is not indexed and only counted in `crowded`, which keeps every look-up short. What
    is found is verified; of what is there, a little is missed (see `RECALL`).
    """

    def __init__(self, near: float):
        self.near, self.crowded = near, 0
        self._empty = MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=int)
        self._lsh = MinHashLSH(num_perm=PERMUTATIONS, params=bands(near))
        self._kept: list[tuple[Words, npt.NDArray[np.uint32]]] = []
        self._keys: list[int] = []
        # Four standard deviations of the estimate: whatever is further below is not worth the exact look.
        self._least = near - 4 * math.sqrt(near * (1 - near) / PERMUTATIONS)

    def find(self, shingles: Words) -> Iterator[tuple[int, float]]:
        """(key, similarity) of the sets that are near, about in the order of their similarity."""
        if len(shingles):
            minhash = self._minhash(shingles)
            yield from self._verified(shingles, minhash, self._lsh.query(minhash))

    def add(self, key: int, shingles: Words) -> None:
        """Index a set, whatever it is near to."""
        if len(shingles):
            minhash = self._minhash(shingles)
            self._insert(key, shingles, minhash, self._lsh.query(minhash))

    def find_or_add(self, key: int, shingles: Words) -> tuple[int, float] | None:
        """The first set found near, or None where there is none; only then this one is indexed."""
        if not len(shingles):
            return None
        minhash = self._minhash(shingles)
        candidates = self._lsh.query(minhash)
        found = next(self._verified(shingles, minhash, candidates), None)
        if found is None:
            self._insert(key, shingles, minhash, candidates)
        return found

    def _minhash(self, shingles: Words) -> Any:
        minhash = self._empty.copy()
        minhash.update_batch((shingles >> np.uint64(32)).tolist())
        return minhash

    def _insert(self, key: int, shingles: Words, minhash: Any, candidates: Sequence[Any]) -> None:
        if len(candidates) > CROWD:
            self.crowded += 1
            return
        self._lsh.insert(len(self._kept), minhash, check_duplication=False)
        self._kept.append((shingles, minhash.hashvalues))
        self._keys.append(key)

    def _verified(self, shingles: Words, minhash: Any, candidates: Sequence[Any]) -> Iterator[tuple[int, float]]:
        if not candidates:
            return
        places = sorted(candidates)
        guesses = (np.stack([self._kept[place][1] for place in places]) == minhash.hashvalues).mean(axis=1)
        for number in np.argsort(-guesses, kind="stable"):
            if guesses[number] < self._least:
                return
            exact = similarity(shingles, self._kept[places[number]][0])
            if exact >= self.near:
                yield self._keys[places[number]], exact


# ---------------------------------------------------------------- evaluation prompts


class Evaluation:
    """The distinct prompts of evaluation sets, to be looked for in training prompts."""

    def __init__(self, sources: Sequence[str], near: float, ngram: int, shingler: Shingler):
        self.near, self.ngram, self._shingler = near, ngram, shingler
        self.wheres: list[str] = []
        self.source_of: list[str] = []
        self._exact: dict[bytes, int] = {}
        self._index = NearIndex(near)
        grams: list[Words] = []
        for source in sources:
            before = len(self.wheres)
            for where, text in _evaluation_prompts(source):
                self._add(source, where, text, grams)
            if len(self.wheres) == before and not any(True for _ in read_rows(source)):
                raise UsageError(f"{source}: no rows")
        self._sort(grams)

    @property
    def crowded(self) -> int:
        return self._index.crowded

    def _add(self, source: str, where: str, text: str, grams: list[Words]) -> None:
        number = len(self.wheres)
        if not normalised(text) or self._exact.setdefault(fingerprint([text]), number) != number:
            return
        self.wheres.append(where)
        self.source_of.append(source)
        words = self._shingler.numbers(text)
        self._index.add(number, self._shingler.shingled(words))
        grams.append(self._shingler.ngrams(words, self.ngram))

    def _sort(self, grams: Sequence[Words]) -> None:
        """N-grams in order with the prompt of each, but for those of a template (see `CROWD`)."""
        hashes = np.concatenate([*grams, np.empty(0, dtype=np.uint64)])
        owners = np.repeat(np.arange(len(grams)), [len(own) for own in grams])
        order = np.argsort(hashes, kind="stable")
        hashes, owners = hashes[order], owners[order]
        _, number, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        telling = counts[number] <= CROWD
        self._hashes, self._owners = hashes[telling], owners[telling]
        self._totals = np.bincount(self._owners, minlength=len(grams))

    def met(self, prompt: str) -> dict[str, list[int]]:
        """Numbers of the evaluation prompts that this one is, is near to, or holds the n-grams of, by the measure's name."""
        same = self._exact.get(fingerprint([prompt]))
        words = self._shingler.numbers(prompt)
        near = [number for number, _ in self._index.find(self._shingler.shingled(words))]
        return {
            "overlap_exact": [] if same is None else [same],
            "overlap_near": [number for number in near if number != same],
            "overlap_ngrams": [number for number in self._held(self._shingler.ngrams(words, self.ngram)) if number != same],
        }

    def _held(self, grams: Words) -> list[int]:
        """The prompts whose n-grams are among these to the share `near` or more."""
        first, last = np.searchsorted(self._hashes, grams), np.searchsorted(self._hashes, grams, side="right")
        hits = [self._owners[i:j] for i, j in zip(first, last, strict=True) if j > i]
        if not hits:
            return []
        numbers, counts = np.unique(np.concatenate(hits), return_counts=True)
        return [int(n) for n in numbers[counts >= self.near * self._totals[numbers] - 1e-9]]


def _evaluation_prompts(source: str) -> Iterator[tuple[str, str]]:
    for _, example in training_rows(source, EVALUATION_FORMS):
        yield example.where, example.prompt if example.prompt is not None else "\n".join(example.answers[:1])


# ---------------------------------------------------------------- length


def token_counter(tokenizer: str | None) -> Callable[[Sequence[str]], list[float]]:
    """What counts the tokens of texts: a tokenizer's folder or name, 'embedded', or an estimate of 4 characters a token.

    Raises: UsageError where there is no such tokenizer.
    """
    if tokenizer is None:
        return lambda texts: [len(text) / 4 for text in texts]
    from rlaif.engines.chat import load_tokenizer

    try:
        loaded = load_tokenizer(_folder(tokenizer))
    except RlaifError as error:
        raise UsageError(f"--tokenizer {tokenizer}: {error}") from error

    def count(texts: Sequence[str]) -> list[float]:
        clean = [SURROGATE.sub("\ufffd", text) for text in texts]
        return [len(ids) for ids in loaded(clean, add_special_tokens=False, verbose=False)["input_ids"]]

    return count


def _folder(tokenizer: str) -> str:
    if tokenizer != "embedded":
        return tokenizer
    from rlaif.engines.embedded import embedded_model

    return str(embedded_model())


# ---------------------------------------------------------------- the check


@dataclass
class Settings:
    """What is looked for. `limits` maps a measure to the greatest share that is still good.

    `near`: the least Jaccard similarity of near-duplicates, and the least share of an evaluation prompt's n-grams that makes
    a training prompt hold it. `ngram`: their words. `max_tokens`: of prompt and (longer) answer.
    """

    against: Sequence[str] = ()
    near: float = 0.8
    ngram: int = 8
    max_tokens: int | None = None
    tokenizer: str | None = None
    limits: Mapping[str, float] = field(default_factory=dict)
    resamples: int = 1000
    seed: int = 0


@dataclass
class Measure:
    """A share: `count` of `n` rows, with the places of the first ones. The interval is for `longer` alone."""

    count: int = 0
    n: int = 0
    examples: list[str] = field(default_factory=list)
    low: float | None = None
    high: float | None = None
    limit: float | None = None

    def add(self, hit: bool, example: str) -> None:
        self.n += 1
        self.count += hit
        if hit and len(self.examples) < EXAMPLES:
            self.examples.append(example)

    @property
    def value(self) -> float | None:
        return self.count / self.n if self.n else None

    @property
    def over(self) -> bool:
        return self.limit is not None and self.value is not None and self.value > self.limit

    def as_dict(self, name: str) -> dict[str, Any]:
        return {"name": name, "value": self.value, **asdict(self), "over": self.over}


class Checker:
    """One pass over the rows of a training set; what it keeps of a row is its fingerprints and its shingles."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.source, self.form = "", ""
        self.measures: defaultdict[str, Measure] = defaultdict(Measure)
        self.soft_labels = array("d")
        self._shingler = Shingler()
        self._index = NearIndex(settings.near)
        self._evaluation: Evaluation | None = None
        if settings.against:
            self._evaluation = Evaluation(settings.against, settings.near, settings.ngram, self._shingler)
        self._met: set[int] = set()
        self._count = token_counter(settings.tokenizer)
        self._seen: dict[bytes, int] = {}
        self._wheres: list[str] = []
        self._prompts: dict[bytes, int] = {}
        self._longer, self._prompt_of = array("b"), array("q")

    def run(self, source: str) -> dict[str, Any]:
        """Check every row of a source; returns what was found, ready for JSON. Raises: as `check` does."""
        self.source = source
        rows = training_rows(source)
        while batch := list(islice(rows, BATCH)):
            self.form = batch[0][0]
            examples = [example for _, example in batch]
            for example in examples:
                self._add(example)
            if self.settings.max_tokens is not None:
                self._lengths(examples, self.settings.max_tokens)
        if not self._wheres:
            raise UsageError(f"{source}: no rows")
        self._finish()
        return self._found(source)

    def _add(self, example: Example) -> None:
        number = len(self._wheres)
        self._wheres.append(example.where)
        self._duplicates(number, example)
        self._overlap(example)
        blank = not all(text.strip() for text in (*([] if example.prompt is None else [example.prompt]), *example.answers))
        self._hit("empty", blank, example)
        if len(example.answers) == 2:
            self._pair(example)
        if example.label is not None:
            self._hit("label_true", example.label, example)

    def _hit(self, name: str, hit: bool, example: Example, other: str = "") -> None:
        self.measures[name].add(hit, f"{example.where}{other}")

    def _duplicates(self, number: int, example: Example) -> None:
        first = self._seen.setdefault(fingerprint([example.prompt, *example.answers]), number)
        self._hit("duplicates", first != number, example, f" is {self._place(first)}")
        near = None
        if first == number:
            near = self._index.find_or_add(number, self._shingler.shingles([example.prompt, *example.answers]))
        other = f" is near {self._place(near[0])}: {near[1]:.2f}" if near else ""
        self._hit("near", near is not None, example, other)

    def _place(self, number: int) -> str:
        """An earlier row's line, without the file that the example has named already."""
        return self._wheres[number].removeprefix(f"{self.source} ")

    def _overlap(self, example: Example) -> None:
        prompt = example.answers[0] if self.form == "text" and example.prompt is None else example.prompt
        if self._evaluation is None or prompt is None:
            return
        met = self._evaluation.met(prompt)
        every = [number for numbers in met.values() for number in numbers]
        self._met.update(every)
        for name, numbers in (("overlap", every), *met.items()):
            other = f" has {self._evaluation.wheres[numbers[0]]}" if numbers else ""
            self._hit(name, bool(numbers), example, other)

    def _pair(self, example: Example) -> None:
        chosen, rejected = example.answers
        self._hit("different_prompts", not example.same_prompt, example)
        self._hit("identical", normalised(chosen) == normalised(rejected), example)
        if example.soft_label is not None:
            self.soft_labels.append(example.soft_label)
        if len(chosen) == len(rejected):
            return
        self._hit("longer", len(chosen) > len(rejected), example)
        # A row without a prompt is a prompt of its own.
        key = fingerprint([example.prompt] if example.prompt is not None else [None, example.where])
        self._longer.append(len(chosen) > len(rejected))
        self._prompt_of.append(self._prompts.setdefault(key, len(self._prompts)))

    def _lengths(self, examples: Sequence[Example], most: int) -> None:
        texts = [text for example in examples for text in (example.prompt or "", *example.answers)]
        counts = iter(self._count(texts))
        for example in examples:
            prompt, *answers = islice(counts, 1 + len(example.answers))
            tokens = math.ceil(prompt + max(answers))
            self._hit("over_length", tokens > most, example, f": {tokens:,} tokens")

    def _finish(self) -> None:
        """What can only be told of all rows, and the limits."""
        if self._evaluation:
            self.measures["evaluation_met"] = Measure(len(self._met), len(self._evaluation.wheres))
        true = self.measures.get("label_true")
        if true and true.n:
            self.measures["imbalance"] = Measure(max(true.count, true.n - true.count), true.n)
        if self._longer:
            hits, prompts = np.array(self._longer, dtype=np.bool_), np.array(self._prompt_of, dtype=np.int64)
            statistic = share(hits, np.ones_like(hits))
            estimate = estimates({"longer": statistic}, prompts, self.settings.resamples, self.settings.seed)["longer"]
            self.measures["longer"].low, self.measures["longer"].high = estimate.low, estimate.high
        for name, limit in self.settings.limits.items():
            if name not in self.measures or not self.measures[name].n:
                raise UsageError(f"a limit on '{MEASURES[name]}' does not go with this file: no row has what it takes")
            self.measures[name].limit = limit

    def _found(self, source: str) -> dict[str, Any]:
        measures = {name: self.measures[name].as_dict(title) for name, title in MEASURES.items() if name in self.measures}
        return {
            "train": source,
            "form": self.form,
            "rows": len(self._wheres),
            "settings": asdict(self.settings),
            "measures": measures,
            "soft_label": _spread(np.array(self.soft_labels)) if self.soft_labels else None,
            "evaluation": self._by_source(),
            "notes": self._notes(),
            "over": [name for name, own in measures.items() if own["over"]],
        }

    def _by_source(self) -> dict[str, dict[str, int]]:
        """Of each evaluation set, its distinct prompts (one counts for the first set that has it) and those that were met."""
        found = {source: {"prompts": 0, "met": 0} for source in self.settings.against}
        for number, source in enumerate(self._evaluation.source_of if self._evaluation else ()):
            found[source]["prompts"] += 1
            found[source]["met"] += number in self._met
        return found

    def _notes(self) -> list[str]:
        told = "look like over {} others that they are not near to, as of a template: what is near to them was missed"
        notes = []
        if self._index.crowded:
            notes.append(f"{self._index.crowded} rows {told.format(CROWD)}")
        if self._evaluation and self._evaluation.crowded:
            notes.append(f"{self._evaluation.crowded} evaluation prompts {told.format(CROWD)}")
        if self.settings.max_tokens is not None and self.settings.tokenizer is None:
            notes.append("tokens are an estimate, of 4 characters each; --tokenizer counts them")
        return notes


def _spread(values: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Quartiles and a histogram of ten equal bins over [0, 1]."""
    counts, _ = np.histogram(values, bins=10, range=(0, 1))
    return {"n": len(values), "quartiles": np.percentile(values, [0, 25, 50, 75, 100]).tolist(), "histogram": counts.tolist()}


def check(source: str, settings: Settings) -> dict[str, Any]:
    """Check a training set; the shares by measure (see `MEASURES`), the names of those over their limits, ready for JSON.

    - `duplicates`: rows whose prompt and answers, in lower case and with single blanks, an earlier row has
    - `near`: other rows whose shingles are near to those of an earlier row that is itself near to none before it
    - `overlap`: rows whose prompt is one of an evaluation set, near to one, or holds the n-grams of one; of rows with a prompt
    - `longer`: pairs whose chosen answer has more characters, of those of unequal length; interval by resampling prompts

    Raises: UsageError naming file, line and column for a value of another type, and for a limit that the file has nothing
    to hold against.
    """
    if settings.tokenizer is not None and settings.max_tokens is None:
        raise UsageError("--tokenizer goes with --max-tokens")
    if "over_length" in settings.limits and settings.max_tokens is None:
        raise UsageError("--max-over-length goes with --max-tokens")
    if "overlap" in settings.limits and not settings.against:
        raise UsageError("--max-overlap goes with --against")
    return Checker(settings).run(source)


# ---------------------------------------------------------------- table


def render(found: Mapping[str, Any], width: int = 100) -> str:
    """What `check` found as a table, with examples of each measure that has a limit or tells of something wrong."""
    table = tables.new_table("measure", "share", "count", "of", "limit", "")
    for own in found["measures"].values():
        limit = "–" if own["limit"] is None else f"{own['limit']:g}"
        verdict = "" if own["limit"] is None else "over" if own["over"] else "ok"
        table.add_row(own["name"], tables.three(own["value"]), f"{own['count']:,}", f"{own['n']:,}", limit, verdict)
    parts = [f"{found['train']}: {found['rows']:,} rows, {found['form']}", tables.as_lines(table, width)]
    lines = [*_more(found), *(f"note: {note}" for note in found["notes"])]
    if lines:
        parts.append("\n".join(fill(line, width, subsequent_indent="  ", break_on_hyphens=False) for line in lines))
    shown = [(own["name"], own["examples"]) for name, own in found["measures"].items() if own["examples"] and name not in PLAIN]
    if shown:
        parts.append("\n".join(line for name, examples in shown for line in (f"{name}:", *(f"  {text}" for text in examples))))
    return "\n\n".join(parts)


PLAIN = ("overlap", "label_true", "imbalance", "longer")
"""Measures whose examples would tell nothing, or the same once more."""


def _more(found: Mapping[str, Any]) -> Iterator[str]:
    longer = found["measures"].get("longer")
    if longer and longer["low"] is not None:
        yield f"the longer is chosen: 95 % interval {longer['low']:.3f} to {longer['high']:.3f}, by resampling prompts"
    if found["soft_label"]:
        least, first, median, third, most = found["soft_label"]["quartiles"]
        yield f"soft_label: {least:.3f} to {most:.3f}, quartiles {first:.3f}, {median:.3f}, {third:.3f}"
    if len(found["evaluation"]) > 1:
        for source, own in found["evaluation"].items():
            yield f"{source}: {own['met']:,} of {own['prompts']:,} prompts met"
