"""The networks of a run: the policy, the reference that it is held to, and the value network, sharing weights where they can."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlaif.engines.transformers import float32_head
from rlaif.records import UsageError
from rlaif.rl.config import Online, Ppo
from rlaif.rl.generate import Voice, padded_left
from rlaif.train.run import Part, model_path

POLICY, VALUE, REFERENCE = "default", "value", "reference"
"""Names of adapters on the same weights."""


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
    so is a value network of its own. In bf16, frozen weights are kept in bf16, trained ones in float32 (and cast where used);
    logits are always computed in float32.
    """

    def __init__(self, part: Part, device: torch.device, bf16: bool, with_value: bool) -> None:
        config: Ppo | Online = part.config
        self.device, self.pad = device, int(part.tokenizer.pad_token_id)
        self.temperature = config.temperature
        self._cast = bf16 and not part.peft
        self._remote, self._checkpoints = config.trust_remote_code, config.gradient_checkpointing
        torch.manual_seed(part.seed)  # adapters and heads begin at random
        frozen = torch.bfloat16 if bf16 else torch.float32
        self.lm = self._load(
            part.model, frozen if part.peft else torch.float32, eager=getattr(config, "algorithm", "") == "trpo"
        )
        self.adapted = part.peft is not None
        moves = config.reference_update is not None
        if self.adapted:
            self.lm = self._with_adapters(part, [VALUE] * (with_value and self._shares(config)) + [REFERENCE] * moves)
        self.reference = self._reference(config, frozen, moves)
        self.head: nn.Linear | None = None
        self.trunk: Any = None
        if with_value:
            assert isinstance(config, Ppo)
            self._make_value(config, part)
        if config.gradient_checkpointing:
            self._checkpointed()
        self.policy_parameters = [p for n, p in self.lm.named_parameters() if p.requires_grad and f".{VALUE}." not in n]
        self.value_parameters: list[nn.Parameter] = [] if self.head is None else self._value_parameters()
        self._trained = [*self.policy_parameters, *self.value_parameters]
        for parameter in self._trained:
            parameter.requires_grad_(True)

    # ------------------------------------------------------------ making

    def _load(self, name: str, dtype: torch.dtype, eager: bool = False) -> Any:
        more = {"attn_implementation": "eager"} if eager else {}  # others cannot be differentiated twice
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=self._remote, **more)
        return model.to(self.device).eval()  # no dropout: ratios compare the same network

    def _with_adapters(self, part: Part, others: Sequence[str]) -> Any:
        from peft import get_peft_model

        model: Any = get_peft_model(self.lm, part.peft, adapter_name=POLICY)
        for name in others:
            model.add_adapter(name, part.peft)
        model.set_adapter(POLICY)
        own = dict(model.named_parameters())
        for name, parameter in own.items():
            if f".{VALUE}." in name:
                parameter.requires_grad_(True)
            if f".{REFERENCE}." in name:  # both begin at the same place
                parameter.data.copy_(own[name.replace(f".{REFERENCE}.", f".{POLICY}.")].data)
        return model.eval()

    def _reference(self, config: Ppo | Online, frozen: torch.dtype, moves: bool) -> Any:
        """A model of its own; None where it is the policy's own weights, without or with another adapter."""
        if config.reference:
            if moves and self.adapted:
                raise UsageError("reference: with LoRA, a reference that moves is the model that the policy begins from")
            # One that moves gathers small steps, which bf16 would lose.
            return self._load(model_path(config.reference), torch.float32 if moves else frozen).requires_grad_(False)
        return None if self.adapted else copy.deepcopy(self.lm).requires_grad_(False)

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
        """InstructGPT's way (arXiv 2203.02155, §C.4): the value network begins as the reward model, its head included."""
        from rlaif.reward import read_folder

        path = read_folder(Path(folder)).models[0]
        model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32, trust_remote_code=self._remote)
        score = getattr(model, "score", None)
        if not isinstance(score, nn.Linear) or score.in_features != model.config.get_text_config().hidden_size:
            raise UsageError(f"value_from: {folder} has no linear head 'score'")
        self.head = nn.Linear(score.in_features, 1, device=self.device)
        self.head.weight.data.copy_(score.weight.data.mean(0, keepdim=True))
        nn.init.zeros_(self.head.bias)
        self.trunk = _trunk(model).to(self.device).eval()
        if part.peft:
            from peft import get_peft_model

            self.trunk = get_peft_model(self.trunk, part.peft).eval()

    def _checkpointed(self) -> None:
        for model in [self.lm] if self.trunk is None else [self.lm, self.trunk]:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
                if hasattr(module, "attention_dropout"):
                    module.attention_dropout = 0.0

    def _mode(self, model: Any) -> None:
        """transformers checkpoints nothing in eval mode, and caches nothing where it checkpoints."""
        if self._checkpoints:
            model.train(torch.is_grad_enabled())

    def _value_parameters(self) -> list[nn.Parameter]:
        assert self.head is not None
        trunk = self.trunk if self.trunk is not None else nn.Module()
        shared = [p for n, p in self.lm.named_parameters() if f".{VALUE}." in n]
        return [*self.head.parameters(), *(p for p in trunk.parameters() if p.requires_grad), *shared]

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
                self._keep_trained()
                yield
        finally:
            self.lm.set_adapter(POLICY)
            self._keep_trained()

    def valuing(self) -> Any:
        """The context of `values` and of its gradient: checkpointed layers are computed again for that."""
        return self.using(VALUE) if self._value_adapter else nullcontext()

    def _keep_trained(self) -> None:
        """peft takes whatever is not active for frozen."""
        for name, parameter in self.lm.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(f".{REFERENCE}." not in name)

    def as_reference(self) -> Any:
        """(model, context) to compute the reference with."""
        if self.reference is not None:
            return self.reference, nullcontext()
        return self.lm, self.using(REFERENCE if REFERENCE in self.lm.peft_config else None)

    def move_reference(self, share: float) -> None:
        """Let the reference go that share of the way to the policy; with LoRA, in the adapters' factors."""
        if self.reference is not None:
            pairs = zip(self.reference.parameters(), self.lm.parameters(), strict=True)
        else:
            own = dict(self.lm.named_parameters())
            names = [name for name in own if f".{REFERENCE}." in name]
            pairs = ((own[name], own[name.replace(f".{REFERENCE}.", f".{POLICY}.")]) for name in names)  # type: ignore[assignment]
        with torch.no_grad():
            for kept, new in pairs:
                kept.lerp_(new.to(kept.dtype), share)

    # ------------------------------------------------------------ passes

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16) if self._cast else nullcontext()

    def forward(self, batch: Batch, hidden: bool = False) -> tuple[Tensor, Tensor | None]:
        """The policy's logits over each of the response's tokens (B, T, V), by temperature; a shared head's values (B, T)."""
        logits, states = self._pass(self.lm, batch, hidden)
        return logits / self.temperature, self._valued(
            states[:, -1 - batch.response.shape[1] : -1]
        ) if states is not None else None

    def _pass(self, model: Any, batch: Batch, hidden: bool = False) -> tuple[Tensor, Tensor | None]:
        self._mode(model)
        with self._autocast(), float32_head(self._bare(model)):
            out = model(
                input_ids=batch.ids,
                attention_mask=batch.mask,
                position_ids=(batch.mask.cumsum(1) - 1).clamp(min=0),
                use_cache=False,
                output_hidden_states=hidden,
                logits_to_keep=batch.response.shape[1] + 1,
            )
        return out.logits[:, :-1].float(), out.hidden_states[-1] if hidden else None

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
        width = batch.response.shape[1]
        if self.value_is_shared:
            return cast(Tensor, self.forward(batch, hidden=True)[1])
        trunk = self.trunk if self.trunk is not None else _trunk(self._base)
        self._mode(trunk)
        with self._autocast():
            places = (batch.mask.cumsum(1) - 1).clamp(min=0)
            out = trunk(input_ids=batch.ids, attention_mask=batch.mask, position_ids=places, use_cache=False)
        return self._valued(out.last_hidden_state[:, -1 - width : -1])

    def _valued(self, states: Tensor) -> Tensor:
        assert self.head is not None
        return self.head(states.float())[..., 0]  # type: ignore[no-any-return]

    # ------------------------------------------------------------ sampling

    def voices(self, mixture: float = 0.0) -> list[Voice]:
        """The policy to sample from, or its geometric mixture with that share of the reference."""
        own = Voice(self._last_logits(None), 1 - mixture)
        return [own, Voice(self._last_logits("reference"), mixture)] if mixture else [own]

    def _last_logits(self, whose: str | None) -> Any:
        def forward(ids: Tensor, mask: Tensor, places: Tensor, cache: Any) -> Tensor:
            model, context = (self.lm, nullcontext()) if whose is None else self.as_reference()
            self._mode(model)
            with context, self._autocast(), float32_head(self._bare(model)):
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
        """All weights that a run changes, for a checkpoint."""
        return {name: tensor.detach().clone() for name, tensor in self._changing()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self._changing():
                tensor.copy_(state[name])

    def _changing(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.lm.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                yield f"policy.{name}", parameter
        for lead, module in (("head", self.head), ("trunk", self.trunk), ("reference", self.reference)):
            if module is not None:
                yield from ((f"{lead}.{name}", parameter) for name, parameter in module.named_parameters())

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
