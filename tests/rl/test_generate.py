"""Drawing responses: their distribution, their independence of whatever stands beside them, and their ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlaif.rl.generate import TransformersSampler, Voice, drawn, padded_left
from tests.engines.tiny import save_tiny
from tests.train.conftest import one_thread as one_thread

CPU = torch.device("cpu")
PAD, END = 256, 258
PROMPTS = [[65, 66], [70, 80, 90, 100, 110, 7, 8], [5], [1, 2, 3, 4], [9] * 12, [33, 44, 55]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        save_tiny(tmp_path_factory.mktemp("model") / "tiny"), dtype=torch.float32
    ).eval()


def voice(model: Any, share: float = 1.0, steps: list[int] | None = None) -> Voice:
    """`steps` gathers the number of rows of each pass."""

    def forward(ids: Tensor, mask: Tensor, places: Tensor, cache: Any) -> Tensor:
        if steps is not None:
            steps.append(len(ids))
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]

    return Voice(forward, share)


def planted(logits: Tensor, share: float = 1.0) -> Voice:
    """A model that says the same after every prompt."""
    return Voice(lambda ids, mask, places, cache: logits.expand(len(ids), -1), share)


def sample(
    voices: Sequence[Voice],
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    tokens: int = 12,
    temperature: float = 1.0,
    ends: Sequence[int] = (END,),
) -> list[list[int]]:
    return TransformersSampler(voices, PAD, CPU).sample(prompts, seeds, tokens, temperature, ends)


# ---------------------------------------------------------------- a token


def test_a_token_is_the_first_above_its_chance() -> None:
    chances = torch.tensor([0.0, 0.2499, 0.25, 0.9, 1 - 2**-24])
    assert drawn(torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]] * 5), chances).tolist() == [1, 1, 3, 3, 3]


chance = st.integers(0, 2**24 - 1).map(lambda n: n / 2**24)  # as torch.rand draws them
weights = st.lists(st.sampled_from([0.0, 0.0, 1e-30, 1e-6, 0.3, 1.0, 7.0]) | st.floats(0, 1), min_size=1, max_size=30)


@given(weights.filter(lambda some: sum(some) > 1e-20), chance)
def test_no_token_is_drawn_that_cannot_be(some: list[float], own: float) -> None:
    probabilities = (torch.tensor(some, dtype=torch.float64) / sum(some)).float()[None]
    token = drawn(probabilities, torch.tensor([own])).item()
    assert probabilities[0, token] > 0
    before, upto = np.float64(probabilities[0].double().cumsum(0)[[token - 1, token]])
    total = float(probabilities.double().sum())
    assert own * total < upto + 1e-12
    assert token == 0 or before <= own * total + 1e-12


@given(weights.filter(lambda some: sum(some) > 1e-20))
def test_tokens_come_as_often_as_they_are_probable(some: list[float]) -> None:
    """Over evenly spaced chances, each one's share is exact to two of them."""
    probabilities = torch.tensor(some, dtype=torch.float64) / sum(some)
    tokens = drawn(probabilities.expand(1000, -1), torch.arange(1000) / 1000)
    found = torch.bincount(tokens, minlength=len(some)) / 1000
    assert (found - probabilities).abs().max() <= 0.002


# ---------------------------------------------------------------- the distribution


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_models_distribution(temperature: float) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 2.5, -40.0])
    count = 4000
    found = sample([planted(logits)], [[1]] * count, range(count), 1, temperature)
    wanted = np.exp(logits.double().numpy() / temperature)[:-1]
    seen = np.bincount([row[0] for row in found], minlength=7)
    assert seen[6] == 0
    assert chisquare(seen[:6], count * wanted / wanted.sum()).pvalue > 1e-3


def test_each_token_has_a_draw_of_its_own() -> None:
    """Two tokens in a row: all pairs as often as they should be."""
    found = sample([planted(torch.zeros(4))], [[1]] * 3200, range(3200), 2)
    seen = np.bincount([4 * a + b for a, b in found], minlength=16)
    assert chisquare(seen).pvalue > 1e-3


def test_samples_follow_a_real_model(model: Any) -> None:
    prompt, temperature, count = [72, 105], 0.7, 3000
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].double() / temperature
    wanted = logits.softmax(-1).numpy()
    seen = np.bincount(
        [row[0] for row in sample([voice(model)], [prompt] * count, range(count), 1, temperature)], minlength=259
    )
    often = wanted * count > 5
    together = [*seen[often], seen[~often].sum()], [*wanted[often] * count, wanted[~often].sum() * count]
    assert often.sum() > 5
    assert chisquare(*together).pvalue > 1e-3


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_a_mixture_is_the_normalised_geometric_mean(share: float) -> None:
    first, second = torch.randn(2, 9, generator=torch.Generator().manual_seed(1)) * 2
    second[3] = -torch.inf  # what one voice cannot say, none can
    voices = [each for each in (planted(first, 1 - share), planted(second, share)) if each.share]
    mixed = np.zeros(9)
    for one in voices:
        logits = one.forward([[1]], None, None, None)[0].double() / 0.8
        mixed += one.share * logits.log_softmax(-1).numpy()
    wanted = np.exp(mixed) / np.exp(mixed).sum()
    chances = (torch.arange(20_000) + 0.5) / 20_000
    sampler = TransformersSampler(voices, PAD, CPU)
    tokens = sampler._draw(torch.ones(20_000, 1), None, None, [None] * len(voices), 0.8, chances)  # type: ignore[arg-type]
    assert np.abs(np.bincount(tokens, minlength=9) / 20_000 - wanted).max() <= 1e-4
    assert (wanted[3] == 0) == (share > 0)


# ---------------------------------------------------------------- a seed's own draws


def test_a_response_depends_on_its_seed_alone(model: Any) -> None:
    seeds = [7, 8, 9, 10, 11, 2**59]
    whole = sample([voice(model)], PROMPTS, seeds)
    for place, alone in enumerate(whole):
        assert sample([voice(model)], [PROMPTS[place]], [seeds[place]]) == [alone]
    order = [3, 0, 5, 1, 4, 2]
    assert sample([voice(model)], [PROMPTS[n] for n in order], [seeds[n] for n in order]) == [whole[n] for n in order]
    beside = sample(
        [voice(model)], [PROMPTS[0], [3] * 40, PROMPTS[0]], [7, 1, 8]
    )  # much padding, a neighbour of the same prompt
    assert beside[0] == whole[0]
    assert beside[2] != whole[0]
    assert sample([voice(model)], PROMPTS, seeds, tokens=4) == [row[:4] for row in whole]


def test_the_random_numbers_of_others_stay_as_they_are(model: Any) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    sample([voice(model)], PROMPTS, range(6), 3)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- against transformers


@pytest.mark.parametrize("voices", [1, 2])
def test_a_cold_sample_is_the_greedy_one(model: Any, voices: int) -> None:
    """Two voices of the same model are that model."""
    found = sample([voice(model, 1 / voices) for _ in range(voices)], PROMPTS, range(6), 12, 1e-4)
    ids, mask = padded_left(PROMPTS, PAD, CPU)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=PAD)
    answers = out[:, ids.shape[1] :].tolist()
    assert found == [row[: row.index(END) + 1] if END in row else row for row in answers]


def test_what_is_drawn_is_what_the_model_says_without_a_cache(model: Any) -> None:
    """Each token is `drawn` by its chance from the distribution of a pass over the whole text so far."""
    seeds = range(20, 26)
    for prompt, seed, found in zip(PROMPTS, seeds, sample([voice(model)], PROMPTS, seeds, 8, 0.9), strict=True):
        chances = torch.rand(8, generator=torch.Generator().manual_seed(seed))
        for place, token in enumerate(found):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + found[:place]])).logits[:, -1]
            assert drawn((logits / 0.9).softmax(-1), chances[[place]]).item() == token


# ---------------------------------------------------------------- ends


def test_responses_end_with_an_end_or_run_out(model: Any) -> None:
    ends = tuple(range(0, 256, 12))
    rows = [PROMPTS[n % 6] for n in range(48)]
    found = sample([voice(model)], rows, range(48), 20, 1.0, ends)
    assert len({len(row) for row in found}) > 5
    for row in found:
        assert 1 <= len(row) <= 20
        assert not set(row[:-1]) & set(ends)
        assert len(row) == 20 or row[-1] in ends
    assert all(len(row) == 20 for row in sample([voice(model)], rows[:6], range(6), 20, 1.0, ()))
    assert [len(row) for row in sample([voice(model)], rows[:6], range(6), 1)] == [1] * 6


def test_finished_rows_leave_the_batch_and_nothing_changes(model: Any) -> None:
    ends = tuple(range(0, 256, 12))
    rows, steps = [PROMPTS[n % 6] for n in range(48)], list[int]()
    found = sample([voice(model, 1.0, steps)], rows, range(48), 20, 1.0, ends)
    assert steps == sorted(steps, reverse=True)
    assert len(set(steps)) > 3
    for width, going in zip(steps, (sum(len(row) > n for row in found) for n in range(20)), strict=False):
        assert going <= width
        assert 4 * going > 3 * width
    free = sample([voice(model)], rows, range(48), 20, 1.0, ())
    cut = [next((row[: n + 1] for n, token in enumerate(row) if token in ends), row) for row in free]
    assert found == cut
    assert len(steps) == max(map(len, found))  # nothing is computed for nobody


def test_a_mixtures_caches_are_cut_alike(model: Any, tmp_path: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "other", seed=1), dtype=torch.float32).eval()
    voices = [voice(model, 0.6), voice(other, 0.4)]
    ends, rows = tuple(range(0, 256, 12)), [PROMPTS[n % 6] for n in range(24)]
    found = sample(voices, rows, range(24), 12, 1.0, ends)
    assert found == [sample(voices, [row], [n], 12, 1.0, ends)[0] for n, row in enumerate(rows)]


def test_rows_are_padded_on_the_left() -> None:
    ids, mask = padded_left([[1], [2, 3, 4]], 9, CPU)
    assert ids.tolist() == [[9, 9, 1], [2, 3, 4]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]
