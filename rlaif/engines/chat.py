"""From a request to token ids, for engines that hold the model themselves: rendering, guarding, and the choices' tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer

from rlaif.engines import beginnings
from rlaif.records import FatalError, Message, Request, RowError, digest
from rlaif.reward import weights_hash

BREAK = "\u200b"
"""Zero-width space: put after a marker's first character, it leaves the text as it looks and the marker powerless."""

MARKER = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]|\S[^\n]*:(?=[ \t]*$)", re.MULTILINE)
"""What a chat template writes around a message to say whose it is: `<|user|>`, `[INST]`, `### Response:`, `USER:`."""

AFTER = (" ", "x", "_", ">", ":", "\n")
"""What an answer may stand behind, to see by what tokens a tokenizer writes it there."""

PROBE = "XcontentX"
TURNS = (("system", "user", "assistant", "user"), ("user", "assistant", "user"), ("user",))
"""Conversations to see a template's markers by; the first that it takes counts."""


def identified(model: str) -> dict[str, Any]:
    """What tells a model from others: its name, and the hash of its weights where it is a folder, which may be trained anew."""
    return {"model": model, **({"weights": weights_hash(Path(model))} if Path(model).is_dir() else {})}


class Chat:
    """A model's tokenizer and chat template.

    `limit` is the most tokens that prompt and answer may have together (None: not known). `notes` are remarks for the
    run file. Without a chat template, as base models are, the messages are joined by blank lines.

    A message's content can never add a message or a control token: what would be a special token of the tokenizer or
    one of the template's own role markers is broken by a zero-width space, and whatever slips through is refused.
    """

    def __init__(self, tokenizer: Any, model: str, limit: int | None = None):
        self.tokenizer, self.model, self.limit = tokenizer, model, limit
        self.notes: list[str] = []
        if not tokenizer.chat_template:
            self.notes.append(f"{model} has no chat template: messages are joined by blank lines, as for a base model")
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        special = {str(token) for token in [*added, *tokenizer.all_special_tokens]}
        # The unknown token is no control token, and may stand for any rare character.
        ids = set(tokenizer.convert_tokens_to_ids(sorted(special)))
        self._special = ids - {tokenizer.unk_token_id, None}
        markers = sorted(m for m in special | self._template_markers() if len(m) > 1)
        # A lookahead, so that of overlapping markers each is broken.
        self._marker = re.compile(f"(?=(?:{'|'.join(map(re.escape, markers))}))." if markers else r"(?!)", re.DOTALL)
        self._ids: dict[str, list[int]] = {}

    def render(self, request: Request) -> list[int]:
        """The token ids that the model is to go on from: the messages, and the beginning of its own turn.

        Raises: RowError where they are more than the context holds or a content has a control token that cannot be
        broken; FatalError where the chat template refuses such messages.
        """
        ids = self._encode([self.guard(m["content"]) for m in request.messages], request)
        harmless = self._encode([PROBE] * len(request.messages), request)
        if self._controls(ids) != self._controls(harmless):
            raise RowError(f"the prompt holds a control token of {self.model}")
        if self.limit and len(ids) + request.max_tokens > self.limit:
            wanted = f", {request.max_tokens} of them for the answer" if request.max_tokens > 1 else ""
            raise RowError(f"the prompt is {len(ids)} tokens, the context of {self.model} holds {self.limit}{wanted}")
        return ids

    def guard(self, text: str) -> str:
        """The text with each marker in it broken; lone surrogates, which no tokenizer takes, become `?`."""
        return self._marker.sub(lambda first: first.group() + BREAK, text.encode("utf-8", "replace").decode())

    def choice_ids(self, choices: tuple[str, ...]) -> dict[str, list[int]]:
        """Each choice's single-token spellings: itself, and with a space before it.

        Raises: FatalError for a choice that the vocabulary has no one token for, as its probability would take more
        than one step to know.
        """
        for choice in choices:
            if not self._spellings(choice):
                raise FatalError(
                    f"the choice '{choice}' is not a single token of {self.model}: use choices that are, such as digits or "
                    "letters"
                )
        return {choice: self._ids[choice] for choice in choices}

    def split_choices(self, choices: tuple[str, ...]) -> dict[str, str]:
        """Choices that are several tokens and begin with another choice, to that one."""
        return {choice: start for choice, start in beginnings(choices).items() if not self._spellings(choice)}

    def decode(self, ids: list[int]) -> str:
        """The text of generated tokens, without control tokens."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _spellings(self, choice: str) -> list[int]:
        if choice not in self._ids:
            self._ids[choice] = self._spelled(choice)
        return self._ids[choice]

    def _spelled(self, choice: str) -> list[int]:
        spellings = [self.tokenizer.encode(text, add_special_tokens=False) for text in (choice, " " + choice)]
        found = {ids[0] for ids in spellings if len(ids) == 1}
        # SentencePiece puts a space before every text, so its tokens without one are found by name only. Not every token of
        # that name is one that the tokenizer makes: one that splits numbers into digits may have `10` all the same.
        vocabulary = self.tokenizer.get_vocab()
        named = {vocabulary[token] for token in (choice, "\u2581" + choice) if token in vocabulary}
        after = {self.tokenizer.encode(start + choice, add_special_tokens=False)[-1] for start in AFTER}
        found |= {i for i in named & after if self.tokenizer.decode([i]).strip() == choice.strip()}
        return sorted(found)

    def _controls(self, ids: list[int]) -> int:
        return sum(i in self._special for i in ids)

    def _encode(self, contents: list[str], request: Request) -> list[int]:
        roles = [m["role"] for m in request.messages]
        messages: list[Message] = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
        templated = bool(self.tokenizer.chat_template)
        try:
            text = self._template(messages) if templated else "\n\n".join([*contents, ""])
        except jinja2.TemplateError as error:
            raise FatalError(
                f"the chat template of {self.model} refuses the messages: {' '.join(str(error).split())}"
            ) from error
        # A template writes the special tokens itself; a second one at the beginning would change the answer.
        ids: list[int] = self.tokenizer(text + request.prefix, add_special_tokens=not templated, verbose=False).input_ids
        return ids

    def _template(self, messages: list[Message]) -> str:
        text: str = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return text

    def _template_markers(self) -> set[str]:
        for roles in TURNS if self.tokenizer.chat_template else ():
            try:
                text = self._template([{"role": role, "content": PROBE} for role in roles])  # type: ignore[typeddict-item]
            except jinja2.TemplateError:
                continue
            return {marker for piece in text.split(PROBE) for marker in MARKER.findall(piece)}
        return set()


def own_seed(request: Request, ids: list[int]) -> int | None:
    """A seed for this very request, from its own, its sample's number and its prompt: samples must differ."""
    return None if request.seed is None else int(digest([request.seed, request.sample, ids])[:15], 16)


def load_tokenizer(model: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder or of a model on the hub.

    Raises: FatalError where there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise cannot_load(model, error) from error


def cannot_load(model: str, error: Exception) -> FatalError:
    """One line for whatever a library says when it cannot load a model."""
    return FatalError(f"cannot load the model '{model}': {first_words(error)}")


def first_words(error: BaseException) -> str:
    """An error's text on one line, at most 300 characters; its class where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__
