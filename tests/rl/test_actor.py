"""The networks of a run: what they compute, what they share, what learns, and what is kept of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertLMHeadModel,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

from rlaif.records import UsageError
from rlaif.rl.actor import Actor, Batch, collate, entropies, token_logprobs
from rlaif.rl.config import Ppo
from rlaif.rl.generate import padded_left
from rlaif.train.data import Rows
from rlaif.train.run import Part, load_tokenizer
from tests.engines.tiny import save_tiny, tiny_tokenizer
from tests.train.conftest import one_thread as one_thread

CPU, PAD = torch.device("cpu"), 256
PROMPTS = [[72, 105], [1, 2, 3, 4, 5, 6, 7], [9]]
RESPONSES = [[10, 20, 30, 258], [11], [40, 50, 60, 70, 80, 90]]
LORA = {"r": 4, "alpha": 8}
LORAS: list[Any] = [None, LORA]
EXACT = {"rtol": 0.0, "atol": 0.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("actor")
    save_tiny(folder / "tiny")
    save_tiny(folder / "other", seed=1)
    save_reward_model(folder / "tiny", folder / "reward", 1)
    save_reward_model(folder / "tiny", folder / "heads", 3)
    return folder


def save_reward_model(model: Path, folder: Path, heads: int, adapter: bool = False) -> None:
    """As `rlaif train reward` leaves it."""
    torch.manual_seed(5)
    made: Any = AutoModelForSequenceClassification.from_pretrained(model, num_labels=heads, dtype=torch.float32)
    stir(made.parameters(), 0.02)
    if adapter:
        made = get_peft_model(
            made, LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"])
        )
        stir((p for p in made.parameters() if p.requires_grad), 0.05)
    made.save_pretrained(folder)
    load_tokenizer(config(model)).save_pretrained(folder)
    facts = {"name": "r", "heads": [f"h{n}" for n in range(heads)] if heads > 1 else [], "form": "plain", "max_length": 99}
    (folder / "reward.json").write_text(json.dumps({**facts, "members": [], "combine": "mean", "weights": "0"}))


def config(model: Path, **more: Any) -> Ppo:
    own = {"name": "run.yaml", "model": str(model), "data": "none.jsonl", "out": "out", "device": "cpu"}
    return Ppo.model_validate({**own, "reward": [{"kind": "length", "most": 5}], **more})


def actor(place: Path, model: str = "tiny", bf16: bool = False, with_value: bool = False, **more: Any) -> Actor:
    settings = config(place / model, **more)
    tokenizer = load_tokenizer(settings)
    part = Part("train", settings, settings.model, place, settings.seed, tokenizer, Rows("none", []), None)
    return Actor(part, CPU, bf16, with_value)


def stir(parameters: Iterable[Tensor], size: float = 0.05, seed: int = 0) -> None:
    """Move some weights at random, as learning would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.data += size * torch.randn(parameter.shape, generator=generator)


def batch() -> Batch:
    return collate(PROMPTS, RESPONSES, PAD, CPU)


@torch.no_grad()
def plain(model: Any, temperature: float = 1.0) -> Tensor:
    """The responses' log-probabilities in float64, one by one and without padding."""
    model = copy.deepcopy(model).double()
    found = torch.zeros(len(PROMPTS), max(map(len, RESPONSES)), dtype=torch.float64)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
        found[row, : len(response)] = logits.log_softmax(-1)[torch.arange(len(response)), response]
    return found


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def close(found: Tensor, wanted: Tensor, size: float = 1e-4) -> None:
    torch.testing.assert_close(found.detach().double(), wanted.double(), rtol=size, atol=size)


def differs(first: Tensor, second: Tensor) -> bool:
    return bool((first - second).abs().max() > 1e-3)


@torch.no_grad()
def values(networks: Actor) -> Tensor:
    with networks.valuing():
        return networks.values(batch())


def named(networks: Actor) -> dict[str, torch.nn.Parameter]:
    """All parameters of policy and value network."""
    modules = {"lm": networks.lm, "trunk": networks.trunk, "head": networks.head}
    return {f"{lead}.{n}": p for lead, module in modules.items() if module is not None for n, p in module.named_parameters()}


# ---------------------------------------------------------------- log-probabilities


def test_a_batch_holds_prompts_to_the_left_and_responses_to_the_right() -> None:
    made = collate([[1], [2, 3]], [[4, 5], [6]], PAD, CPU)
    assert made.ids.tolist() == [[PAD, 1, 4, 5], [2, 3, 6, PAD]]
    assert made.mask.tolist() == [[0, 1, 1, 1], [1, 1, 1, 0]]
    assert made.tokens.tolist() == [[4, 5], [6, PAD]]
    assert made.response.tolist() == [[1, 1], [1, 0]]
    assert made.places.tolist() == [[0, 0, 1, 2], [0, 1, 2, 2]]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("lora", LORAS)
def test_log_probabilities_are_those_of_a_plain_pass(place: Path, lora: Any, temperature: float) -> None:
    networks = actor(place, lora=lora, temperature=temperature)
    stir(networks.policy_parameters)
    wanted = plain(networks.lm, temperature)
    assert differs(wanted, plain(loaded(place / "tiny"), temperature))
    close(networks.logprobs(batch()), wanted)
    logits, none = networks.forward(batch())
    close(token_logprobs(logits, batch()), wanted)
    assert none is None
    close(networks.logprobs(batch(), temperature=1.0), plain(networks.lm))


def test_entropies_are_those_of_float64() -> None:
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)) * 5
    p = logits.double().softmax(-1)
    close(entropies(logits), -(p * p.log()).sum(-1), 1e-5)


# ---------------------------------------------------------------- the reference


@pytest.mark.parametrize("moving", [{}, {"reference_update": 0.5}])
@pytest.mark.parametrize("lora", LORAS)
@pytest.mark.parametrize("bf16", [False, True])
def test_the_reference_is_where_the_policy_began(place: Path, lora: Any, moving: dict[str, Any], bf16: bool) -> None:
    networks = actor(place, bf16=bf16, lora=lora, **moving)
    before = networks.logprobs(batch()).detach()
    torch.testing.assert_close(networks.reference_logprobs(batch()), before, **EXACT)
    if not bf16:
        close(before, plain(loaded(place / "tiny")))
    stir(networks.policy_parameters)
    assert differs(networks.logprobs(batch()), before)
    torch.testing.assert_close(networks.reference_logprobs(batch()), before, **EXACT)
    assert not networks.reference_logprobs(batch()).requires_grad


@pytest.mark.parametrize("lora", LORAS)
def test_the_reference_may_be_another_model(place: Path, lora: Any) -> None:
    networks = actor(place, lora=lora, reference=str(place / "other"), temperature=0.8)
    close(networks.reference_logprobs(batch()), plain(loaded(place / "other"), 0.8))
    close(networks.logprobs(batch()), plain(loaded(place / "tiny"), 0.8))
    assert not any(parameter.requires_grad for parameter in networks.reference.parameters())


def test_the_same_model_as_reference_is_rounded_as_the_policy_is(place: Path) -> None:
    for lora in LORAS:
        networks = actor(place, bf16=True, lora=lora, reference=str(place / "tiny"))
        torch.testing.assert_close(networks.reference_logprobs(batch()), networks.logprobs(batch()).detach(), **EXACT)


def test_models_that_do_not_go_together_are_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reference: with LoRA, a reference that moves is the model that the policy begins"):
        actor(place, lora=LORA, reference=str(place / "other"), reference_update=0.1)
    strange = tiny_tokenizer()
    strange.add_tokens(["strange"])
    for name, settings in (
        ("other", {"reference": str(tmp_path / "other")}),
        ("reward", {"value_from": str(tmp_path / "reward")}),
    ):
        (tmp_path / name).mkdir()
        for path in (place / name).iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
        strange.save_pretrained(tmp_path / name)
        with pytest.raises(UsageError, match=rf"^{next(iter(settings))}: .*{name} has another vocabulary than .*tiny"):
            actor(place, with_value=True, **settings)
    small = loaded(place / "other")
    small.model.layers = small.model.layers[:1]
    small.config.num_hidden_layers = 1
    small.save_pretrained(tmp_path / "small")
    tiny_tokenizer().save_pretrained(tmp_path / "small")
    with pytest.raises(UsageError, match=r"reference: .*small has other layers than the policy"):
        actor(place, reference=str(tmp_path / "small"), reference_update=0.1)
    actor(place, reference=str(tmp_path / "small"))


def test_a_moving_reference_is_the_average_of_the_weights(place: Path) -> None:
    networks = actor(place, reference_update=0.3)
    start = [p.clone() for p in networks.reference.parameters()]
    stir(networks.policy_parameters)
    networks.move_reference(0.3)
    for kept, old, new in zip(networks.reference.parameters(), start, networks.lm.parameters(), strict=True):
        close(kept, 0.7 * old.double() + 0.3 * new.double(), 1e-6)
    networks.move_reference(1.0)
    torch.testing.assert_close(networks.reference_logprobs(batch()), networks.logprobs(batch()).detach(), **EXACT)


@pytest.mark.parametrize("bf16", [False, True])
def test_with_lora_a_moving_reference_is_the_average_of_the_factors(place: Path, bf16: bool) -> None:
    networks = actor(place, bf16=bf16, lora=LORA, with_value=True, reference_update=0.3)
    weights = {n: p.detach().clone().double() for n, p in networks.lm.named_parameters()}
    stir(networks.policy_parameters)
    stir(networks.value_parameters, seed=1)
    networks.move_reference(0.3)
    after = dict(networks.lm.named_parameters())
    moved = [name for name in after if ".rlaif_reference." in name]
    assert len(moved) == len(networks.policy_parameters)
    for name in moved:
        close(after[name], 0.7 * weights[name] + 0.3 * after[name.replace("rlaif_reference", "default")].double(), 1e-6)
    networks.move_reference(1.0)
    torch.testing.assert_close(networks.reference_logprobs(batch()), networks.logprobs(batch()).detach(), **EXACT)


# ---------------------------------------------------------------- weights that are shared


def test_adapters_do_not_touch_each_other(place: Path) -> None:
    networks = actor(place, lora=LORA, with_value=True, reference_update=0.1)
    stir(networks.policy_parameters)
    stir(networks.value_parameters, seed=1)

    def three() -> list[Tensor]:
        return [networks.logprobs(batch()).detach(), values(networks), networks.reference_logprobs(batch())]

    first = three()
    stir(networks.policy_parameters, seed=2)
    second = three()
    stir(networks.value_parameters, seed=3)
    third = three()
    assert [torch.equal(a, b) for a, b in zip(first, second, strict=True)] == [False, True, True]
    assert [torch.equal(a, b) for a, b in zip(second, third, strict=True)] == [True, False, True]


def test_values_are_those_of_a_plain_pass(place: Path) -> None:
    """With each way to have a value network: the states before each token, times the head."""
    for lora, value in ((None, "separate"), (None, "shared"), (LORA, "separate"), (LORA, "shared")):
        networks = actor(place, lora=lora, with_value=True, value=value)
        assert not values(networks).any()  # they begin at 0
        stir(networks.policy_parameters, seed=1)
        stir(networks.value_parameters, seed=2)
        assert networks.head
        found = values(networks)
        for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            with networks.valuing(), torch.no_grad():
                trunk = networks.trunk or networks._base.model
                states = trunk(torch.tensor([prompt + response])).last_hidden_state[0, len(prompt) - 1 : -1]
            close(found[row, : len(response)], networks.head(states)[:, 0])
        if networks.value_is_shared:
            both = networks.forward(batch(), hidden=True)[1]
            assert both is not None
            close(both, found, 1e-5)
        assert networks.value_is_shared == (value == "shared")


def test_with_lora_there_is_one_copy_of_the_weights(place: Path) -> None:
    networks = actor(place, lora=LORA, with_value=True, reference_update=0.1)
    base = sum(p.numel() for p in loaded(place / "tiny").parameters())
    adapter = sum(p.numel() for p in networks.policy_parameters)
    assert (networks.reference, networks.trunk) == (None, None)
    assert networks.head
    assert sum(p.numel() for p in networks.lm.parameters()) == base + 3 * adapter
    places = {p.data_ptr() for p in networks.lm.parameters()}
    assert len(places) == len(list(networks.lm.parameters()))
    assert {p.data_ptr() for p in networks._base.parameters()} == places
    separate = actor(place, with_value=True)
    mine, others = ({p.data_ptr() for p in m.parameters()} for m in (separate.lm, separate.trunk))
    assert not mine & others
    assert not mine & {p.data_ptr() for p in separate.reference.parameters()}


def losses(networks: Actor) -> None:
    """Gradients as a step takes them."""
    made = batch()
    logits, shared = networks.forward(made, hidden=networks.value_is_shared)
    loss = (token_logprobs(logits, made) * torch.linspace(-1, 1, made.response.shape[1])).sum()
    if shared is not None:
        loss = loss + (shared - 1).square().sum()
    torch.autograd.backward(loss)
    networks.reference_logprobs(made)
    if networks.head is not None and shared is None:
        with networks.valuing():
            torch.autograd.backward((networks.values(made) - 1).square().sum())


WAYS: list[dict[str, Any]] = [
    {"value": "separate"},
    {"value": "shared"},
    {"lora": LORA, "value": "separate"},
    {"lora": LORA, "value": "shared"},
    {"lora": LORA, "value": "separate", "reference_update": 0.1},
    {"value_from": "reward"},
    {"value_from": "reward", "lora": LORA},
]


def way(place: Path, settings: dict[str, Any], **more: Any) -> Actor:
    if "value_from" in settings:
        settings = {**settings, "value_from": str(place / settings["value_from"])}
    networks = actor(place, with_value=True, **settings, **more)
    stir(networks.policy_parameters, seed=1)
    stir(networks.value_parameters, seed=2)
    return networks


@pytest.mark.parametrize("settings", WAYS)
def test_what_is_trained_gets_a_gradient_and_nothing_else(place: Path, settings: dict[str, Any]) -> None:
    networks = way(place, settings)
    losses(networks)
    trained = {id(p) for p in (*networks.policy_parameters, *networks.value_parameters)}
    assert len(trained) == len(networks.policy_parameters) + len(networks.value_parameters)
    whole = named(networks)
    assert trained <= {id(p) for p in whole.values()}
    for name, parameter in whole.items():
        assert parameter.requires_grad == (id(parameter) in trained), name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (id(parameter) in trained), name
    if "lora" in settings:
        assert all("lora_" in name or name.startswith("head") for name, p in whole.items() if p.requires_grad)
    elif "value_from" not in settings:
        assert all(p.requires_grad for p in whole.values())


def test_each_loss_moves_its_own_network(place: Path) -> None:
    networks = way(place, {"lora": LORA})
    torch.autograd.backward(networks.logprobs(batch()).sum())
    assert all(p.grad is not None for p in networks.policy_parameters)
    assert all(p.grad is None for p in networks.value_parameters)
    networks.lm.zero_grad(set_to_none=True)
    with networks.valuing():
        torch.autograd.backward(networks.values(batch()).sum())
    assert all(p.grad is None for p in networks.policy_parameters)
    assert all(p.grad is not None for p in networks.value_parameters)


def test_another_adapter_counts_only_within_its_context(place: Path) -> None:
    networks = way(place, {"lora": LORA, "reference_update": 0.1})
    trained, policy = [*networks.policy_parameters, *networks.value_parameters], networks.logprobs(batch()).detach()
    kept = [p for n, p in networks.lm.named_parameters() if ".rlaif_reference." in n]
    for adapter in (None, "rlaif_value", "rlaif_reference"):
        with networks.using(adapter):
            assert differs(networks.logprobs(batch()), policy)
            assert all(p.requires_grad for p in trained)
            assert not any(p.requires_grad for p in kept)
        with pytest.raises(ZeroDivisionError), networks.using(adapter):
            raise ZeroDivisionError
        torch.testing.assert_close(networks.logprobs(batch()).detach(), policy, **EXACT)
        assert all(p.requires_grad for p in trained)
        assert not any(p.requires_grad for p in kept)


@pytest.mark.parametrize("lora", LORAS)
def test_layers_of_a_model_are_not_taken_for_adapters(tmp_path: Path, lora: Any) -> None:
    """BERT's attention has a layer that is called value."""
    shape = {"vocab_size": 259, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertLMHeadModel(BertConfig(is_decoder=True, **shape)).save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    networks = actor(tmp_path, "bert", with_value=True, value="shared", lora=lora)
    assert len(networks.value_parameters) == 2
    wanted = [p for n, p in networks.lm.named_parameters() if not lora or "lora_" in n]
    assert [id(p) for p in networks.policy_parameters] == [id(p) for p in wanted]
    assert any(".value." in name for name, p in networks.lm.named_parameters() if p.requires_grad)


def test_algorithms_without_values_have_no_head(place: Path) -> None:
    networks = actor(place, lora=LORA)
    assert (networks.head, networks.trunk, networks.value_parameters) == (None, None, [])
    assert list(networks.lm.peft_config) == ["default"]


# ---------------------------------------------------------------- checkpointing, dropout


@pytest.mark.parametrize("settings", WAYS)
def test_gradients_are_the_same_with_checkpointing(place: Path, settings: dict[str, Any]) -> None:
    found = []
    for checkpointing in (False, True):
        networks = way(place, settings, gradient_checkpointing=checkpointing)
        passes: list[bool] = []
        for model in (networks.lm, networks.trunk):
            for name, module in model.named_modules() if model is not None else ():
                if name.endswith("self_attn"):
                    module.register_forward_hook(lambda *_, passes=passes: passes.append(torch.is_grad_enabled()))
        losses(networks)
        found.append(({n: p.grad for n, p in named(networks).items()}, passes.count(True)))
    (plainly, once), (again, twice) = found
    assert plainly.keys() == again.keys()
    for name, grad in plainly.items():
        torch.testing.assert_close(again[name], grad, rtol=1e-5, atol=1e-6)
    assert twice == 2 * once > 0  # the layers were computed again


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_dropout_is_off(tmp_path: Path, kind: str, checkpointing: bool) -> None:
    """GPT-2's dropout is made of layers, OPT's of function calls."""
    shape: dict[str, Any] = {"vocab_size": 259, "max_position_embeddings": 64}
    if kind == "gpt2":
        half = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
        made: Any = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, **half, **shape))
    else:
        shape |= {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        made = OPTForCausalLM(OPTConfig(dropout=0.5, attention_dropout=0.5, **shape))
    made.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    networks = actor(tmp_path, "model", with_value=True, gradient_checkpointing=checkpointing)
    wanted = plain(made.eval())
    with torch.no_grad():
        close(networks.logprobs(batch()), wanted)
    found = networks.logprobs(batch())
    close(found, wanted)
    torch.autograd.backward(found.sum())
    grads = [p.grad.clone() for p in networks.policy_parameters if p.grad is not None]
    networks.lm.zero_grad()
    torch.autograd.backward(networks.logprobs(batch()).sum())
    again = [p.grad for p in networks.policy_parameters if p.grad is not None]
    assert len(grads) > 10
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


def test_sampling_uses_the_cache_where_layers_are_checkpointed(place: Path) -> None:
    networks = actor(place, gradient_checkpointing=True)
    ids, mask = padded_left(PROMPTS, PAD, CPU)
    cache = DynamicCache()
    networks.voices()[0].forward(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), cache)
    assert cache.get_seq_length() == ids.shape[1]


# ---------------------------------------------------------------- bf16


@pytest.mark.parametrize("lora", LORAS)
def test_logits_are_computed_in_float32(place: Path, lora: Any) -> None:
    networks = actor(place, bf16=True, lora=lora, reference_update=0.1)
    stir(networks.policy_parameters)
    kinds = []
    networks._base.model.layers[0].mlp.register_forward_hook(lambda _, given, made: kinds.append(made.dtype))
    weight = networks._base.lm_head.weight
    states: list[Tensor] = []
    networks._base.lm_head.register_forward_pre_hook(lambda _, given: states.append(given[0]))
    with torch.no_grad():
        logits, _ = networks.forward(batch())
    assert kinds[0] == torch.bfloat16
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, linear(states[0][:, :-1].float(), weight.float()), rtol=1e-5, atol=1e-5)
    assert differs(logits, logits.bfloat16().float())  # which bf16 could not tell
    assert "forward" not in vars(networks._base.lm_head)  # the layer is as it was


def test_weights_below_adapters_are_bf16_and_all_others_float32(place: Path) -> None:
    more = {"value_from": str(place / "reward")}
    for lora in LORAS:
        for networks in (
            actor(place, bf16=True, lora=lora, with_value=True),
            actor(place, bf16=True, lora=lora, with_value=True, **more),
        ):
            trained = {id(p) for p in (*networks.policy_parameters, *networks.value_parameters)}
            for name, parameter in named(networks).items():
                assert parameter.dtype == (torch.float32 if id(parameter) in trained else torch.bfloat16), name
            for model in (networks.lm, networks.trunk):
                for name, buffer in model.named_buffers() if model is not None else ():
                    assert buffer.dtype == torch.float32, name  # frequencies of positions
            stir(networks.policy_parameters)
            stir(networks.value_parameters)
            losses(networks)
            assert all(
                p.grad is not None and p.grad.dtype == torch.float32 for n, p in named(networks).items() if p.requires_grad
            )
            assert values(networks).dtype == networks.logprobs(batch()).dtype == torch.float32


# ---------------------------------------------------------------- value networks from reward models


@pytest.mark.parametrize("lora", LORAS)
@pytest.mark.parametrize("folder", ["reward", "heads", "adapter"])
def test_values_begin_as_the_reward_models_scores(place: Path, tmp_path: Path, folder: str, lora: Any) -> None:
    if folder == "adapter":
        save_reward_model(place / "tiny", tmp_path / "adapter", 1, adapter=True)
        base = AutoModelForSequenceClassification.from_pretrained(place / "tiny", num_labels=1, dtype=torch.float32)
        judge: Any = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload().eval()
        path = tmp_path / "adapter"
        assert not (path / "model.safetensors").exists()
    else:
        path = place / folder
        judge = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    judge.config.pad_token_id = PAD
    networks = actor(place, lora=lora, with_value=True, value_from=str(path))
    found = values(networks)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        for place_, value in enumerate(found[row, : len(response)]):
            with torch.no_grad():
                close(value, judge(torch.tensor([prompt + response[:place_]])).logits.mean())
    assert found.std() > 0.01
    close(networks.logprobs(batch()), plain(loaded(place / "tiny")))
    stir(networks.value_parameters)
    assert differs(values(networks), found)
    close(networks.logprobs(batch()), plain(loaded(place / "tiny")))


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("lora", LORAS)
def test_voices_are_the_policy_and_the_reference(place: Path, lora: Any) -> None:
    networks = actor(place, lora=lora, temperature=0.5)
    stir(networks.policy_parameters)
    ids, mask = padded_left(PROMPTS, PAD, CPU)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    models = {"own": copy.deepcopy(networks.lm), "start": loaded(place / "tiny")}
    logits = {
        name: torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS]).detach()
        for name, model in models.items()
    }
    for mixture, wanted in ((0.0, [("own", 1.0)]), (0.25, [("own", 0.75), ("start", 0.25)]), (1.0, [("start", 1.0)])):
        voices = networks.voices(mixture)
        assert [voice.share for voice in voices] == [share for _, share in wanted]
        for voice, (name, _) in zip(voices, wanted, strict=True):
            with torch.no_grad():
                close(voice.forward(ids, mask, places, DynamicCache()), logits[name])


# ---------------------------------------------------------------- keeping


@pytest.mark.parametrize("settings", [*WAYS, {"reference_update": 0.5, "reference": "other"}, {"reference": "other"}])
def test_what_was_learnt_is_kept_and_taken_up(place: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    settings = {**settings, **({"reference": str(place / settings["reference"])} if "reference" in settings else {})}
    networks = way(place, settings)
    if "reference_update" in settings:
        networks.move_reference(0.5)
    state = networks.state()
    torch.save(state, tmp_path / "state.pt")
    wanted = [networks.logprobs(batch()).detach(), values(networks), networks.reference_logprobs(batch())]
    stir([*networks.policy_parameters, *networks.value_parameters], seed=5)
    assert differs(networks.logprobs(batch()), wanted[0])
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in state.items())  # it is a copy
    for other in (networks, way(place, settings)):
        other.load_state(saved)
        found = [other.logprobs(batch()).detach(), values(other), other.reference_logprobs(batch())]
        for one, own in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, own, **EXACT)
    trained = sum(p.numel() for p in (*networks.policy_parameters, *networks.value_parameters))
    moving = 0
    if "reference_update" in settings:
        kept = networks.policy_parameters if "lora" in settings else networks.reference.parameters()
        moving = sum(p.numel() for p in kept)
    assert sum(tensor.numel() for tensor in state.values()) == trained + moving  # and nothing that stays as it is


@pytest.mark.parametrize("settings", [{}, {"lora": LORA}, {"lora": LORA, "reference_update": 0.1}])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_saved_model_is_the_policy(place: Path, tmp_path: Path, settings: dict[str, Any], bf16: bool) -> None:
    networks = actor(place, bf16=bf16, with_value=True, **settings)
    stir(networks.policy_parameters)
    stir(networks.value_parameters, seed=1)
    exact = actor(place, with_value=True, **settings)
    exact.load_state(networks.state())
    networks.save(tmp_path / "model", str(place / "tiny"), merge=True)
    assert not list((tmp_path / "model").glob("adapter*"))
    close(plain(loaded(tmp_path / "model")), plain(exact.lm))
    assert all(t.dtype == torch.float32 for t in load_file(tmp_path / "model" / "model.safetensors").values())
    close(networks.logprobs(batch()), plain(exact.lm), 1.0 if bf16 else 1e-4)  # it goes on as it was


def test_small_adapters_are_not_swallowed_by_bf16(place: Path, tmp_path: Path) -> None:
    networks = actor(place, bf16=True, lora=LORA)
    stir(networks.policy_parameters, 1e-3)
    networks.save(tmp_path / "model", str(place / "tiny"), merge=True)
    start, saved = (load_file(folder / "model.safetensors") for folder in (place / "tiny", tmp_path / "model"))
    layer = networks._base.model.layers[0].mlp.up_proj
    wanted = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight  # alpha / r
    name = "model.layers.0.mlp.up_proj.weight"
    steps = (start[name].bfloat16().float() * 2**-8).abs()
    assert (wanted.abs() < steps / 2).float().mean() > 0.5  # most of it bf16 would lose
    torch.testing.assert_close(saved[name] - start[name], wanted.detach(), rtol=1e-2, atol=1e-7)


def test_an_adapter_saved_alone_is_the_policys(place: Path, tmp_path: Path) -> None:
    networks = way(place, {"lora": LORA, "reference_update": 0.1})
    networks.save(tmp_path / "model", str(place / "tiny"), merge=False)
    assert not (tmp_path / "model" / "model.safetensors").exists()
    assert [path for path in (tmp_path / "model").iterdir() if path.is_dir()] == []
    saved = load_file(tmp_path / "model" / "adapter_model.safetensors")
    assert len(saved) == len(networks.policy_parameters)
    close(plain(PeftModel.from_pretrained(loaded(place / "tiny"), str(tmp_path / "model")).eval()), plain(networks.lm))
    close(plain(loaded(tmp_path / "model")), plain(networks.lm))  # transformers finds the base by itself
