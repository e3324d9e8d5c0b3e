"""The policy's weights, merged without touching it; and real vLLM, which draws by them.

vLLM is installed by `make .venv-vllm/ready` only, in an environment of its own; without it the second half is skipped.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from rlaif.records import FatalError, UsageError
from rlaif.rl.vllm import VllmSampler, merged_weights
from tests.engines.tiny import save_tiny

ATTENTION = ["q_proj", "v_proj"]


def tiny(folder: Path, tied: bool = False) -> Any:
    model = LlamaForCausalLM.from_pretrained(save_tiny(folder), dtype=torch.float32)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return model.eval()


def adapted(model: Any, **settings: Any) -> PeftModel:
    """The policy's adapter and a second one, neither of them zero."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **settings)
    peft = get_peft_model(model, config)
    peft.add_adapter("value", LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=["o_proj", *ATTENTION]))
    return peft.eval()


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def merged_by_peft(model: PeftModel) -> dict[str, torch.Tensor]:
    other = deepcopy(model)
    other.set_adapter("default")
    return state(other.merge_and_unload(adapter_names=["default"]))


# ---------------------------------------------------------------- the weights


@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_model_is_given_as_a_checkpoint_holds_it(tmp_path: Path, tied: bool) -> None:
    model = tiny(tmp_path / "whole", tied)
    expected = state(model)
    if tied:
        del expected["lm_head.weight"]  # one tensor, which comes once
    assert same(dict(merged_weights(model)), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": [*ATTENTION, "embed_tokens", "lm_head"]},
        {"target_modules": ATTENTION, "use_dora": True},
        {"target_modules": ATTENTION, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
        {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "norm"]},
    ],
    ids=["linear", "embeddings", "dora", "rslora", "modules_to_save"],
)
@pytest.mark.parametrize("active", ["default", "value"])
def test_an_adapter_is_merged_as_peft_merges_it_and_the_model_stays_as_it_is(
    tmp_path: Path, settings: dict[str, Any], active: str
) -> None:
    model = adapted(tiny(tmp_path / "lora"), **settings)
    if "modules_to_save" in settings:
        with torch.no_grad():
            model.get_output_embeddings().weight.add_(1.0)
    model.set_adapter(active)
    before = state(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert same(dict(merged_weights(model)), merged_by_peft(model))
    assert same(state(model), before)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained


def test_what_the_second_adapter_holds_has_no_influence(tmp_path: Path) -> None:
    model = adapted(tiny(tmp_path / "lora"), target_modules=ATTENTION)
    before = dict(merged_weights(model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".value." in name:
                parameter.add_(1.0)
    assert same(dict(merged_weights(model)), before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.default." in name:
                parameter.add_(1.0)
    assert not same(dict(merged_weights(model)), before)


def test_bad_settings_are_refused_before_vllm_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="unknown dtype 'fp8'"):
        VllmSampler("nowhere", dtype="fp8", max_length=64)
    if find_spec("vllm") is None:
        with pytest.raises(FatalError, match="vLLM is not installed"):
            VllmSampler("nowhere", dtype="fp32", max_length=64)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="a single process"):
        VllmSampler("nowhere", dtype="fp32", max_length=64)


# ---------------------------------------------------------------- real vLLM

TINY_TEMPERATURE = 1e-6
"""vLLM takes the most probable token below 1e-5."""

LENGTH = 12
QUESTIONS = ["Name three colours.", "Here is a list. " + "apple, pear, plum, " * 60 + "and that is all. Who wrote Hamlet?"]
"""The second fills more than one block of vLLM's cache of prefixes, which holds whole blocks only: 128 tokens on a CPU."""

CLOSE, FAR = 0.05, 0.5  # nats; vLLM's attention in fp32 is .02 off on a CPU
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="needs real vLLM: make .venv-vllm/ready")


@pytest.fixture(scope="module")
def source() -> str:
    from rlaif.engines.embedded import embedded_model

    return str(embedded_model())


@pytest.fixture(scope="module")
def sampler(source: str) -> Iterator[VllmSampler]:
    """In fp32: so near to transformers that the most probable tokens are the same ones."""
    random.seed(7)
    torch.manual_seed(7)
    made = VllmSampler(source, dtype="fp32", max_length=512)
    drawn = random.random(), torch.rand(1).item()
    random.seed(7)
    torch.manual_seed(7)
    assert drawn == (random.random(), torch.rand(1).item()), "the run's own random numbers are not disturbed"
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ
    yield made
    made.close()


@pytest.fixture
def policy(source: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(source: str) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    turns = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [list(tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)) for turn in turns]


@pytest.fixture(scope="module")
def end(source: str) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(source).eos_token_id)


def short_of_best(model: Any, prompts: list[list[int]], responses: list[list[int]]) -> float:
    """The most that a token of the responses is less probable, by transformers, than the best one there; in nats.

    Greedy responses of two programs need not be equal: rounding tips close draws, and all that follows is another text.
    """
    gaps = []
    for ids, response in zip(prompts, responses, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + response])).logits[0, len(ids) - 1 : -1].double()
        gaps.append((logits.max(-1).values - logits.gather(-1, torch.tensor(response)[:, None])[:, 0]).max().item())
    return max(gaps)


def drawn(sampler: VllmSampler, prompts: list[list[int]], end: int) -> list[list[int]]:
    return sampler.sample(prompts, range(len(prompts)), LENGTH, TINY_TEMPERATURE, [end])


def shaken(model: Any, part: str, by: float) -> None:
    """Noise on the weights of that name, as a share of their own spread."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if part in name:
                weight.add_(torch.randn_like(weight) * weight.std() * by)


@pytest.mark.vllm
@needs_vllm
@pytest.mark.parametrize(("part", "by"), [("down_proj", 0.15), ("q_proj", 0.5), ("norm", 0.4), ("embed_tokens", 0.3)])
def test_changed_weights_are_drawn_by(
    sampler: VllmSampler, policy: Any, prompts: list[list[int]], end: int, part: str, by: float
) -> None:
    sampler.sync(policy)
    unchanged = drawn(sampler, prompts, end)
    assert short_of_best(policy, prompts, unchanged) < CLOSE
    shaken(policy, part, by)
    sampler.sync(policy)  # the same prompts: what vLLM has cached of them is of the old weights
    assert short_of_best(policy, prompts, drawn(sampler, prompts, end)) < CLOSE
    assert short_of_best(policy, prompts, unchanged) > FAR


@pytest.mark.vllm
@needs_vllm
def test_an_adapted_policy_is_drawn_from_and_stays_as_it_is(
    sampler: VllmSampler, policy: Any, prompts: list[list[int]], end: int
) -> None:
    sampler.sync(policy)
    whole = drawn(sampler, prompts, end)
    model = adapted(policy, target_modules=ATTENTION)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(0.4)
    before = state(model)
    sampler.sync(model)
    assert same(state(model), before)
    found = drawn(sampler, prompts, end)
    assert short_of_best(model, prompts, found) < CLOSE
    assert short_of_best(model, prompts, whole) > FAR
    model.set_adapter("value")
    assert short_of_best(model, prompts, found) > FAR, "the second adapter would show"
    sampler.sync(model)
    assert drawn(sampler, prompts, end) == found
    model.set_adapter("default")
    ids = torch.tensor([prompts[0]])
    model(input_ids=ids, labels=ids).loss.backward()  # vLLM leaves learning as it was
    assert any(weight.grad is not None and weight.grad.any() for weight in model.parameters())


@pytest.mark.vllm
@needs_vllm
def test_a_seed_settles_a_response(sampler: VllmSampler, policy: Any, prompts: list[list[int]], end: int) -> None:
    sampler.sync(policy)
    first = sampler.sample(prompts * 2, [1, 2, 3, 4], LENGTH, 1.0, [end])
    assert all(one != other for one, other in zip(first[:2], first[2:], strict=True))
    random.seed(3)
    torch.manual_seed(3)
    assert sampler.sample(prompts[::-1], [2, 1], LENGTH, 1.0, [end]) == first[1::-1], "whatever is drawn besides"


@pytest.mark.vllm
@needs_vllm
def test_a_response_has_the_token_that_ended_it(sampler: VllmSampler, policy: Any, prompts: list[list[int]], end: int) -> None:
    sampler.sync(policy)
    short = prompts[0]
    seeds = list(range(16))
    found = sampler.sample([short] * 16, seeds, 32, 1.0, [end])
    ended = [(seed, ids) for seed, ids in zip(seeds, found, strict=True) if ids[-1] == end]
    cut = [ids for ids in found if ids[-1] != end]
    assert ended, "some end by themselves"
    assert cut, "some do not"
    assert all(ids.count(end) == 1 for _, ids in ended)
    assert all(len(ids) == 32 and end not in ids for ids in cut)
    seed, ids = ended[0]
    assert sampler.sample([short], [seed], 32, 1.0, [ids[2]]) == [ids[: ids.index(ids[2]) + 1]], "any token can be an end"
    (on,) = sampler.sample([short], [seed], len(ids) + 4, 1.0, [])
    assert len(on) == len(ids) + 4, "and without ends, none is"
    assert on[: len(ids)] == ids


@pytest.mark.vllm
@needs_vllm
def test_adapters_that_untie_the_embeddings_are_refused(sampler: VllmSampler, policy: Any) -> None:
    with pytest.raises(UsageError, match="output layer is its input embeddings"):
        sampler.sync(adapted(policy, target_modules=["lm_head"]))


@pytest.mark.vllm
@needs_vllm
def test_a_device_that_this_build_cannot_take_is_refused(source: str) -> None:
    with pytest.raises(UsageError, match="not on 'mps'"):
        VllmSampler(source, dtype="fp32", max_length=64, device="mps")
