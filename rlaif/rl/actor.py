"""The networks of a run: policy, reference that it is held to, and value network, which share weights where they can."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from rlaif.engines.chat import load_tokenizer
from rlaif.engines.packed import float32_head
from rlaif.records import UsageError
from rlaif.rl.config import Online, Ppo
from rlaif.rl.generate import Voice, padded_left
from rlaif.train.run import Part, model_path

POLICY, VALUE, REFERENCE = "default", "rlaif_value", "rlaif_reference"
"""Names of adapters on the same weights, which no layer of a model has: parameters are told apart by them."""


@dataclass(frozen=True)
class Batch:
    """Prompts, padded on the left, with their responses, padded on the right.

    ids, mask: (B, P + T); `response`: (B, T), 1 for a token of the response.
    """

    ids: Tensor
    mask: Tensor
    response: Tensor

    @property
    def tokens(self) -> Tensor:
        """The responses' tokens: (B, T)."""
        return self.ids[:, -self.response.shape[1] :]

    @property
    def places(self) -> Tensor:
        """Where each token stands in its own text, from 0 on: (B, P + T)."""
        return (self.mask.cumsum(1) - 1).clamp(min=0)


def collate(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad: int, device: torch.device) -> Batch:
    """A batch of token ids."""
    left, seen = padded_left(prompts, pad, device)
    width = max(map(len, responses))
    right = torch.tensor([[*row, *[pad] * (width - len(row))] for row in responses], device=device)
    response = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in responses], device=device)
    return Batch(torch.cat([left, right], 1), torch.cat([seen, response], 1), response)


class Actor:
    """Policy, reference and, for algorithms that have one, value network.

    With LoRA all of them are one set of frozen weights: the policy an adapter, the reference the weights without it (or an
    adapter of its own, where it moves), the value network another adapter with a head. Without, the reference is a copy, and
    so is a value network of its own. In bf16, weights below adapters are kept in bf16, all others in float32 (and cast where
    they are used), the reference's as the policy's, so that both are rounded alike; logits are always computed in float32.
    """

    def __init__(self, part: Part, device: torch.device, bf16: bool, with_value: bool) -> None:
        config: Ppo | Online = part.config
        self.device, self.pad = device, int(part.tokenizer.pad_token_id)
        self.temperature = config.temperature
        self._cast = bf16 and not part.peft
        self._remote, self._moves = config.trust_remote_code, config.reference_update is not None
        self._dtype = torch.bfloat16 if bf16 and part.peft else torch.float32
        torch.manual_seed(part.seed)  # adapters and heads begin at random
        self.lm = self._load(part.model)
        self.adapted = part.peft is not None
        if self.adapted:
            self.lm = self._with_adapters(part, [VALUE] * (with_value and self._shares(config)) + [REFERENCE] * self._moves)
        self.reference = self._reference(config, part)
        self.head: nn.Linear | None = None
        self.trunk: Any = None
        if with_value:
            assert isinstance(config, Ppo)
            self._make_value(config, part)
        if config.gradient_checkpointing:
            for model in (self.lm, self.trunk):
                _checkpoint(model)
        self.policy_parameters = [p for n, p in self.lm.named_parameters() if p.requires_grad and f".{VALUE}." not in n]
        self.value_parameters: list[nn.Parameter] = [] if self.head is None else self._value_parameters()

    # ------------------------------------------------------------ making

    def _load(self, name: str) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=self._dtype, trust_remote_code=self._remote)
        return model.to(self.device).eval()  # no dropout: ratios compare the same network

    def _with_adapters(self, part: Part, others: Sequence[str]) -> Any:
        from peft import get_peft_model

        model: Any = get_peft_model(self.lm, part.peft, adapter_name=POLICY)
        for name in others:
            model.add_adapter(name, part.peft)
        model.set_adapter(POLICY)
        _keep_trained(model)
        for kept, new in _both_factors(model):  # both begin at the same place
            kept.data.copy_(new.data)
        return model.eval()

    def _reference(self, config: Ppo | Online, part: Part) -> Any:
        """A model of its own; None where it is the policy's own weights, without or with another adapter."""
        if not config.reference:
            return None if self.adapted else copy.deepcopy(self.lm).requires_grad_(False)
        path = model_path(config.reference)
        self._check_vocabulary("reference", path, part)
        model = self._load(path).requires_grad_(False)
        if self._moves and [p.shape for p in model.parameters()] != [p.shape for p in self.lm.parameters()]:
            raise UsageError(f"reference: {config.reference} has other layers than the policy, and so cannot move towards it")
        return model

    def _check_vocabulary(self, setting: str, path: str, part: Part) -> None:
        """Raises: UsageError where the policy's tokens mean something else to that model."""
        if load_tokenizer(path, self._remote).get_vocab() != part.tokenizer.get_vocab():
            raise UsageError(f"{setting}: {path} has another vocabulary than {part.model}")

    @staticmethod
    def _shares(config: Ppo | Online) -> bool:
        """Whether the value network is an adapter on the policy's weights."""
        return isinstance(config, Ppo) and config.value == "separate" and config.value_from is None

    def _make_value(self, config: Ppo, part: Part) -> None:
        width = self._base.config.get_text_config().hidden_size
        self.head = nn.Linear(width, 1, device=self.device)
        nn.init.zeros_(self.head.weight)  # values begin at 0, where whitened rewards are on average
        nn.init.zeros_(self.head.bias)
        if config.value_from:
            self._from_reward_model(config.value_from, part)
        elif config.value == "separate" and not self.adapted:
            self.trunk = copy.deepcopy(_trunk(self.lm))

    def _from_reward_model(self, folder: str, part: Part) -> None:
        """InstructGPT's way (arXiv 2203.02155, §C.4): the value network begins as the reward model, its head included.

        Of several heads it is their mean, of an ensemble its first member.
        """
        from rlaif.engines.reward import load_reward_model
        from rlaif.reward import read_folder

        found = read_folder(Path(folder))
        self._check_vocabulary("value_from", folder, part)
        model = load_reward_model(found.models[0], len(found.heads), self.pad, torch.float32, self._remote)
        score = getattr(model, "score", None)
        if not isinstance(score, nn.Linear) or score.in_features != model.config.get_text_config().hidden_size:
            raise UsageError(f"value_from: {folder} has no linear head 'score'")
        self.head = nn.Linear(score.in_features, 1, device=self.device)
        self.head.weight.data.copy_(score.weight.data.mean(0, keepdim=True))
        nn.init.zeros_(self.head.bias)
        self.trunk = _trunk(model).to(self.device).requires_grad_(True).eval()
        if part.peft:
            from peft import get_peft_model

            for parameter in self.trunk.parameters():
                parameter.data = parameter.data.to(self._dtype)
            self.trunk = get_peft_model(self.trunk, part.peft).eval()

    def _value_parameters(self) -> list[nn.Parameter]:
        assert self.head is not None
        own = [] if self.trunk is None else [p for p in self.trunk.parameters() if p.requires_grad]
        return [*self.head.parameters(), *own, *(p for n, p in self.lm.named_parameters() if f".{VALUE}." in n)]

    @property
    def _base(self) -> Any:
        return self._bare(self.lm)

    def _bare(self, model: Any) -> Any:
        """Without peft's wrapper."""
        return model.get_base_model() if model is self.lm and self.adapted else model

    @property
    def value_is_shared(self) -> bool:
        """Whether the value is a head on the policy's own hidden states, for one pass to give both."""
        return self.head is not None and self.trunk is None and not self._value_adapter

    @property
    def _value_adapter(self) -> bool:
        return self.adapted and VALUE in self.lm.peft_config

    # ------------------------------------------------------------ whose weights

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """Compute with this adapter, with None without any; afterwards with the policy's."""
        if not self.adapted:
            yield
            return
        try:
            with self.lm.disable_adapter() if adapter is None else nullcontext():
                if adapter is not None:
                    self.lm.set_adapter(adapter)
                _keep_trained(self.lm)
                yield
        finally:
            self.lm.set_adapter(POLICY)
            _keep_trained(self.lm)

    def valuing(self) -> Any:
        """The context of `values` and of its gradient: checkpointed layers are computed again for that."""
        return self.using(VALUE) if self._value_adapter else nullcontext()

    def as_reference(self) -> Any:
        """(model, context) to compute the reference with."""
        if self.reference is not None:
            return self.reference, nullcontext()
        return self.lm, self.using(REFERENCE if REFERENCE in self.lm.peft_config else None)

    def move_reference(self, share: float) -> None:
        """Let the reference go that share of the way to the policy; with LoRA, in the adapters' factors."""
        if self.reference is None:
            pairs = _both_factors(self.lm)
        else:
            pairs = zip(self.reference.parameters(), self.lm.parameters(), strict=True)
        with torch.no_grad():
            for kept, new in pairs:
                kept.lerp_(new, share)

    # ------------------------------------------------------------ passes

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16) if self._cast else nullcontext()

    def forward(self, batch: Batch, hidden: bool = False) -> tuple[Tensor, Tensor | None]:
        """The policy's logits over each of the response's tokens (B, T, V), by temperature; a shared head's values (B, T)."""
        logits, states = self._pass(self.lm, batch, hidden)
        return logits / self.temperature, None if states is None else self._valued(states)

    def _pass(self, model: Any, batch: Batch, hidden: bool = False) -> tuple[Tensor, Tensor | None]:
        """Logits over each of the response's tokens and, with `hidden`, the states that they come from."""
        before = slice(-1 - batch.response.shape[1], -1)  # each token is told by the place before it
        with self._autocast(), float32_head(self._bare(model)):
            out = model(
                input_ids=batch.ids,
                attention_mask=batch.mask,
                position_ids=batch.places,
                use_cache=False,
                output_hidden_states=hidden,
                logits_to_keep=batch.response.shape[1] + 1,
            )
        return out.logits[:, before].float(), out.hidden_states[-1][:, before] if hidden else None

    def logprobs(self, batch: Batch, temperature: float | None = None) -> Tensor:
        """The policy's log-probabilities of the response's tokens: (B, T), 0 for padding."""
        return token_logprobs(self._pass(self.lm, batch)[0] / (temperature or self.temperature), batch)

    def reference_logprobs(self, batch: Batch) -> Tensor:
        """The reference's; without gradient."""
        model, context = self.as_reference()
        with torch.no_grad(), context:
            return token_logprobs(self._pass(model, batch)[0] / self.temperature, batch)

    def values(self, batch: Batch) -> Tensor:
        """What the value network expects from before each token of the response on: (B, T). Within `valuing`."""
        trunk = _trunk(self._base) if self.trunk is None else self.trunk
        with self._autocast():
            out = trunk(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.places, use_cache=False)
        return self._valued(out.last_hidden_state[:, -1 - batch.response.shape[1] : -1])

    def _valued(self, states: Tensor) -> Tensor:
        assert self.head is not None
        return self.head(states.float())[..., 0]  # type: ignore[no-any-return]

    # ------------------------------------------------------------ sampling

    def voices(self, mixture: float = 0.0) -> list[Voice]:
        """The policy to sample from, or its geometric mixture with that share of the reference."""
        both = [Voice(self._last_logits(False), 1 - mixture), Voice(self._last_logits(True), mixture)]
        return [voice for voice in both if voice.share]

    def _last_logits(self, of_reference: bool) -> Any:
        def forward(ids: Tensor, mask: Tensor, places: Tensor, cache: Any) -> Tensor:
            model, context = self.as_reference() if of_reference else (self.lm, nullcontext())
            with context, self._autocast():  # a draw needs no more digits than bf16 has
                out = model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=places,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            return cast(Tensor, out.logits[:, -1])

        return forward

    # ------------------------------------------------------------ keeping

    def state(self) -> dict[str, Tensor]:
        """All weights that a run changes, for a checkpoint; copies in the CPU's memory, of which there is more."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._changing()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self._changing():
                tensor.copy_(state[name])

    def _changing(self) -> Iterator[tuple[str, Tensor]]:
        for lead, module in (("policy", self.lm), ("head", self.head), ("trunk", self.trunk), ("reference", self.reference)):
            for name, parameter in module.named_parameters() if module is not None else ():
                if parameter.requires_grad or (self._moves and (lead == "reference" or f".{REFERENCE}." in name)):
                    yield f"{lead}.{name}", parameter

    def save(self, folder: Path, model: str, merge: bool) -> None:
        """Write the policy: whole, or its adapter alone.

        Adapters are merged in float32, for in bf16 the weights' steps would swallow what was learnt.
        """
        if not self.adapted:
            self.lm.save_pretrained(folder)
            return
        self.lm.save_pretrained(folder, selected_adapters=[POLICY])
        if merge:
            from peft import PeftModel

            base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=self._remote)
            merged: Any = PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
            for path in folder.glob("adapter_*"):
                path.unlink()
            merged.save_pretrained(folder)


def _keep_trained(model: Any) -> None:
    """peft takes whatever is not active for frozen."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(f".{REFERENCE}." not in name)


def _both_factors(model: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The factors of the reference's adapter, where there is one, each with the policy's."""
    own = dict(model.named_parameters())
    return ((own[name], own[name.replace(f".{REFERENCE}.", f".{POLICY}.")]) for name in own if f".{REFERENCE}." in name)


def _checkpoint(model: nn.Module | None) -> None:
    """Keep no states within layers for the gradient, but compute them again.

    transformers' own way wants a model in training mode, which would bring dropout back.
    """
    for layer in model.modules() if model is not None else ():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def _trunk(model: Any) -> Any:
    """A model without its head: hidden states come out of it."""
    return getattr(model, model.base_model_prefix)


def token_logprobs(logits: Tensor, batch: Batch) -> Tensor:
    """Log-probabilities of the response's tokens under logits (B, T, V): (B, T), 0 for padding."""
    chosen = logits.gather(-1, batch.tokens[..., None])[..., 0]
    return (chosen - logits.logsumexp(-1)) * batch.response


def entropies(logits: Tensor) -> Tensor:
    """The entropy of each token's distribution, nats: (B, T) of (B, T, V)."""
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)
