"""Context distillation: a model learns to answer as it would after a context, without that context.

L(θ) = KL(p₀(· | context, prompt, answer so far) ‖ p_θ(· | prompt, answer so far)), the mean over the completions' tokens, where
p₀ is the model before training (Askell et al., arXiv 2112.00861, §2.1): the teacher. It never changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from trl.models import prepare_deepspeed, prepare_fsdp

from rlaif.data import ASSISTANT, as_text
from rlaif.prompts import load_template
from rlaif.records import Row, UsageError
from rlaif.sample import Answers, InContext, load_icl
from rlaif.train.config import Sft
from rlaif.train.data import Rows, guarded
from rlaif.train.run import load_tokenizer, model_path
from rlaif.yamlfile import SUFFIXES, load

IGNORED = -100
PROBE = "XcontentX"

# ---------------------------------------------------------------- the context


@dataclass(frozen=True)
class Context:
    """What the teacher sees and the student does not: a text, or questions with answers, which are turns or fill a template."""

    text: str = ""
    shown: InContext | None = None
    as_turns: bool = False


def load_context(name: str) -> Context:
    """A YAML file of questions with answers, a text file, or else a template of the kind `sample`, by its name or path.

    Raises: UsageError for a file that is missing, empty or wrong, or an unknown template.
    """
    path = Path(name)
    if path.suffix in SUFFIXES:
        return Context(shown=InContext(load_template("urial", "sample"), load(Answers, path)), as_turns=True)
    if path.suffix == ".jinja" or not path.is_file():
        return Context(shown=load_icl(name))
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{name}: cannot be read: {error}") from error
    if not text:
        raise UsageError(f"{name}: is empty")
    return Context(text)


# ---------------------------------------------------------------- tokens


@dataclass(frozen=True)
class Example:
    """Token ids: the prompt as the student has it, and as the teacher has it, after the context; what both go on with."""

    prompt: list[int]
    context: list[int]
    completion: list[int]


@dataclass(frozen=True)
class Encoder:
    """Makes examples of rows.

    Prompt and completion are tokenized apart, as when a model answers: so no token spans their boundary, and the
    completion's tokens are the same after either prompt. They include what ends an answer (the EOS token, or what the chat
    template writes), unless a template shows the context: its answers end in a way of their own, which is not to be learnt.
    """

    context: Context
    tokenizer: Any

    def __call__(self, row: Row) -> Example:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str):
            end = "" if self.context.shown else self.tokenizer.eos_token or ""
            text = completion if completion.endswith(end) else completion + end
            return Example(self._ids(prompt, True), self._ids(self._plain(prompt), True), self._ids(text))
        text = completion[-1]["content"] + ("" if self._templated else self._closing)
        return Example(self._ids(self._chat(prompt)), self._ids(self._after_context(prompt)), self._ids(text))

    def _ids(self, text: str, special: bool = False) -> list[int]:
        """`special`: with a BOS token, which chat templates write themselves."""
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _plain(self, prompt: str) -> str:
        if not self.context.shown:
            return f"{self.context.text}\n\n{prompt}"
        messages, prefix = self._rendered(prompt.removesuffix(ASSISTANT))
        return "\n\n".join([*(m["content"] for m in messages), ""]) + prefix  # as engines do it for base models

    def _after_context(self, prompt: list[dict[str, str]]) -> str:
        if self._templated:
            messages, prefix = self._rendered(as_text(prompt) or "")
            return self._chat(messages) + prefix
        own = [turn for turn in prompt[:1] if turn["role"] == "system"]
        turns = prompt[len(own) :]
        if self.context.shown:
            return self._chat([*own, *self._earlier, *turns])
        if self._takes_system:
            text = "\n\n".join([self.context.text, *(turn["content"] for turn in own)])
            return self._chat([{"role": "system", "content": text}, *turns])
        first = {**turns[0], "content": f"{self.context.text}\n\n{turns[0]['content']}"}
        return self._chat([first, *turns[1:]])

    def _rendered(self, prompt: str) -> tuple[Any, str]:
        """The template's messages, and how the answer begins: as the template says, and with the space before those shown."""
        shown = self.context.shown
        assert shown
        exemplars = [exemplar.model_dump() for exemplar in shown.answers.exemplars]
        messages, prefix = shown.template.render(prompt=prompt, row={}, exemplars=exemplars)
        before = "".join(m["content"] for m in messages).partition(exemplars[0]["answer"])[0]
        return messages, prefix and prefix + before[len(before.rstrip()) :]

    def _chat(self, messages: Sequence[Any], answered: bool = False) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(messages, add_generation_prompt=not answered, tokenize=False)
        except jinja2.TemplateError as error:
            raise UsageError(f"the chat template refuses the messages: {' '.join(str(error).split())}") from error
        return text

    @property
    def _templated(self) -> bool:
        return self.context.shown is not None and not self.context.as_turns

    @property
    def _earlier(self) -> list[dict[str, str]]:
        assert self.context.shown
        return [
            {"role": role, "content": text}
            for exemplar in self.context.shown.answers.exemplars
            for role, text in (("user", exemplar.prompt), ("assistant", exemplar.answer))
        ]

    @cached_property
    def _closing(self) -> str:
        """What the chat template writes after an answer."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
        return self._chat(turns, answered=True).rpartition(PROBE)[2]

    @cached_property
    def _takes_system(self) -> bool:
        try:
            return PROBE in self._chat([{"role": "system", "content": PROBE}, {"role": "user", "content": "?"}])
        except UsageError:
            return False


def within(found: Rows, config: Sft) -> Rows:
    """The rows that fit into the model's context length with the context before them; the others are left out, and counted.

    Raises: UsageError where none is left.
    """
    assert config.context
    most = _context_length(config)
    context, tokenizer = load_context(config.context), load_tokenizer(config)
    if found.conversational and not tokenizer.chat_template:
        raise UsageError(f"{found.source}: holds messages, and {config.model} has no chat template: form must be plain")
    found, encode = guarded(found, tokenizer), Encoder(context, tokenizer)
    examples = [encode(row) for row in found.rows]
    lengths = [max(len(e.context), len(e.prompt)) + len(e.completion) for e in examples]
    rows = [row for row, length in zip(found.rows, lengths, strict=True) if length <= most]
    if not rows:
        raise UsageError(
            f"{found.source}: with the context all {len(lengths)} rows have over {most} tokens, more than the model takes"
        )
    left = Rows(found.source, rows, found.dropped)
    left.dropped[f"over {most} tokens with the context"] += len(lengths) - len(rows)
    return left


def _context_length(config: Sft) -> float:
    """In tokens; infinite where the model does not say."""
    settings = transformers.AutoConfig.from_pretrained(model_path(config.model), trust_remote_code=config.trust_remote_code)
    return getattr(settings.get_text_config(), "max_position_embeddings", None) or math.inf


def collate(examples: Sequence[Example], pad: int) -> dict[str, torch.Tensor]:
    """A batch, padded on the left, so that all completions end in the last column.

    `input_ids`, `attention_mask`, `context_ids`, `context_mask`: (rows, tokens). `labels`: (rows, longest completion + 1), the
    last columns' tokens, with IGNORED for what is no completion; the first column always is none.
    """

    def left(rows: list[list[int]], value: int) -> torch.Tensor:
        return pad_sequence([torch.tensor(ids) for ids in rows], batch_first=True, padding_value=value, padding_side="left")

    sides = {
        "input_ids": [e.prompt + e.completion for e in examples],
        "context_ids": [e.context + e.completion for e in examples],
    }
    widest = max(len(e.completion) for e in examples)
    return {
        **{name: left(rows, pad) for name, rows in sides.items()},
        "attention_mask": left([[1] * len(ids) for ids in sides["input_ids"]], 0),
        "context_mask": left([[1] * len(ids) for ids in sides["context_ids"]], 0),
        "labels": left([[IGNORED] * (widest + 1 - len(e.completion)) + e.completion for e in examples], IGNORED),
    }


# ---------------------------------------------------------------- the loss


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(teacher ‖ student) in nats, (tokens), from logits, (tokens, vocabulary), in float32."""
    wanted, own = (torch.log_softmax(logits.float(), -1) for logits in (teacher, student))
    return torch.nn.functional.kl_div(own, wanted, reduction="none", log_target=True).sum(-1)


def predictions(model: Any, ids: torch.Tensor, mask: torch.Tensor, learnt: torch.Tensor) -> torch.Tensor:
    """Logits, (tokens, vocabulary), by which a model predicts those of the last tokens, (rows, last), that `learnt` marks."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    last = learnt.shape[1] + 1  # a token is predicted one place before its own
    outputs = model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=last, use_cache=False)
    logits: torch.Tensor = outputs.logits[:, :-1][learnt]
    return logits


# ---------------------------------------------------------------- the trainer


class Trainer(transformers.Trainer):
    """Trains on the divergence from `ref_model`, or, without one, from the model itself with its adapters switched off."""

    def __init__(self, *, ref_model: Any = None, **given: Any):
        super().__init__(**given)
        self.model_accepts_loss_kwargs = True  # accumulated batches count by their tokens, whatever model it is
        self.ref_model = ref_model and self._placed(ref_model.eval().requires_grad_(False))

    def _placed(self, model: Any) -> Any:
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(model, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    @contextmanager
    def _teacher(self, model: Any) -> Iterator[Any]:
        if self.ref_model is not None:
            yield self.ref_model
            return
        training = model.training
        model.eval()  # no dropout
        with self.accelerator.unwrap_model(model).disable_adapter():
            yield model
        model.train(training)

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Σ divergence / tokens, of all batches of a step and of all processes where the trainer counted them."""
        learnt = inputs["labels"][:, 1:] != IGNORED
        with torch.no_grad(), self._teacher(model) as teacher:
            wanted = predictions(teacher, inputs["context_ids"], inputs["context_mask"], learnt)
        own = predictions(model, inputs["input_ids"], inputs["attention_mask"], learnt)
        loss = divergence(wanted, own).sum() / (len(own) if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # over which gradients are averaged
        return (loss, {}) if return_outputs else loss
