"""Speed of the engine `embedded` on this machine, against a plain transformers loop and offline vLLM: ratios within one run.

    make .venv-vllm/ready && .venv-vllm/bin/python benchmarks/inprocess.py [--data FILE] [--rounds 3] [--json FILE]

Tasks on real comparisons, each in both orders: labels of one token with a detailed preamble and with a short one, of rows that
are not long and of all; and rationales, at temperature 0 and at 1. Each rival is a process of its own with the same model in
bf16, and computes while the others rest; they take turns, and each turn has prompts that none has seen, the same ones for
all. The plain loop has batches of 16, sorted by length and padded on the left, and computes the logits of the last place
only; its rationales are those of `generate`. It and vLLM get tokens, the engine requests, 64 rows in flight as `rlaif label`
has them. Without vLLM the plain loop is the only rival.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DATA = [Path("../shared/data/hh_harmless_half.jsonl.gz"), Path("rlaif/samples/comparisons.jsonl")]
VERY_DETAILED = str(Path(__file__).with_name("very-detailed.jinja"))
ROWS_IN_FLIGHT = 64
READ = 1500
"""Tokens of a prompt: longer ones are left out, for vLLM reads no more at a time on a CPU."""
LONGEST = {"long": 655, "short": 260}
"""The same for rows that are not long: prompts have 550 tokens in the mean with the detailed preamble, 340 of them shared, and
220 with the short one."""

rival: Any = None  # of this process


class Ours:
    def __init__(self, model: str) -> None:
        from rlaif.engines import make_engine

        self._engine = make_engine("embedded", dtype="bf16", device="cpu")

    def answer(self, rows: list[list[Any]], ids: list[list[int]]) -> list[Any]:
        return asyncio.run(self._answer(rows))

    async def _answer(self, rows: list[list[Any]]) -> list[Any]:
        free = asyncio.Semaphore(ROWS_IN_FLIGHT)

        async def row(requests: list[Any]) -> list[Any]:
            async with free:
                return await asyncio.gather(*map(self._engine.complete, requests))

        return [
            completion.completion_tokens
            if completion.logprobs is None
            else soft(completion.logprobs["1"], completion.logprobs["2"])
            for answers in await asyncio.gather(*map(row, rows))
            for completion in answers
        ]


class Plain:
    def __init__(self, model: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
        self._choices = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids(["1", "2"])
        # The last layer in float32, as labels from logits in bf16 would be multiples of .03.
        self._exact = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).lm_head

    def answer(self, rows: list[list[Any]], ids: list[list[int]]) -> list[Any]:
        import torch

        request, found = rows[0][0], dict[int, Any]()
        order = sorted(range(len(ids)), key=lambda n: len(ids[n]))
        for start in range(0, len(order), 16):
            batch = order[start : start + 16]
            width = max(len(ids[n]) for n in batch)
            tokens = torch.tensor([[2] * (width - len(ids[n])) + ids[n] for n in batch])
            mask = torch.tensor([[0] * (width - len(ids[n])) + [1] * len(ids[n]) for n in batch])
            with torch.inference_mode():
                if request.choices:
                    places = (mask.cumsum(1) - 1).clamp(min=0)
                    out = self._model.model(input_ids=tokens, attention_mask=mask, position_ids=places, use_cache=False)
                    logits = self._exact(out.last_hidden_state[:, -1].float())
                    logprobs = logits.log_softmax(-1)[:, self._choices].tolist()
                    found |= {n: soft(*own) for n, own in zip(batch, logprobs, strict=True)}
                else:
                    how = {"do_sample": True, "temperature": request.temperature, "top_k": 0} if request.temperature else {}
                    out = self._model.generate(
                        tokens,
                        attention_mask=mask,
                        max_new_tokens=request.max_tokens,
                        pad_token_id=2,
                        eos_token_id=2,
                        **(how or {"do_sample": False}),
                    )
                    ends = [(row == 2).nonzero()[:1, 0].tolist() for row in out[:, width:]]
                    found |= {n: end[0] + 1 if end else request.max_tokens for n, end in zip(batch, ends, strict=True)}
        return [found[n] for n in range(len(ids))]


class Vllm:
    def __init__(self, model: str) -> None:
        from transformers import AutoTokenizer
        from vllm import LLM

        self._llm = LLM(model, dtype="bfloat16", enforce_eager=True, enable_prefix_caching=True, max_model_len=4096)
        self._choices = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids(["1", "2"])

    def answer(self, rows: list[list[Any]], ids: list[list[int]]) -> list[Any]:
        from vllm import SamplingParams

        request = rows[0][0]
        wanted: dict[str, Any] = {"logprobs": 20} if request.choices else {}
        how = SamplingParams(temperature=request.temperature, max_tokens=request.max_tokens, **wanted)
        outputs = [one.outputs[0] for one in self._llm.generate([{"prompt_token_ids": i} for i in ids], how, use_tqdm=False)]
        if not request.choices:
            return [len(output.token_ids) for output in outputs]
        first, second = self._choices
        found = [{token: entry.logprob for token, entry in output.logprobs[0].items()} for output in outputs]
        return [soft(own[first], own[second]) if first in own and second in own else math.nan for own in found]

    def close(self) -> None:
        """End its processes, for which this one would wait."""
        self._llm.llm_engine.engine_core.shutdown()


RIVALS = {"ours": Ours, "plain": Plain, "vllm": Vllm}


def soft(first: float, second: float) -> float:
    return 1 / (1 + math.exp(second - first))


def start(name: str, model: str) -> None:
    global rival  # one for each process
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    rival = RIVALS[name](model)


def stop() -> None:
    if isinstance(rival, Vllm):
        rival.close()


def measure(rows: list[list[Any]], ids: list[list[int]]) -> tuple[float, list[Any]]:
    begun = time.perf_counter()
    found = rival.answer(rows, ids)
    return time.perf_counter() - begun, found


def questions(
    data: Path, template: str, ending: str, how: dict[str, Any], chat: Any, longest: int
) -> list[tuple[list[Any], list[list[int]]]]:
    """The requests of each row, and their tokens."""
    from rlaif.data import comparisons
    from rlaif.prompts import load_template
    from rlaif.records import Request

    loaded, found = load_template(template), []
    for item in comparisons(str(data)):
        pair = item.row["response_a"], item.row["response_b"]
        requests = []
        for first, second in (pair, pair[::-1]):
            messages, prefix = loaded.render(ending, prompt=item.prompt, response_1=first, response_2=second, row=item.row)
            choices = loaded.choices if ending == "ending" else ()
            requests.append(Request(messages, prefix, choices, seed=0, **how))
        ids = [chat.render(request) for request in requests]
        if item.problem is None and max(map(len, ids)) <= longest:
            found.append((requests, ids))
    return found


def compare(
    name: str, asked: list[tuple[list[Any], list[list[int]]]], size: int, rounds: int, rivals: dict[str, ProcessPoolExecutor]
) -> dict[str, Any]:
    """Rates of all rivals at one task, from turns of `size` rows each; the first, of a quarter, warms up."""
    if len(asked) < size * rounds + size // 4:
        size = len(asked) * 4 // (4 * rounds + 1)
    rates: dict[str, list[float]] = {who: [] for who in rivals}
    apart: list[float] = []
    scores, prompts = asked[0][0][0].choices, list[list[int]]()
    for number in range(rounds + 1):
        turn, asked = asked[: size if number else size // 4], asked[size if number else size // 4 :]
        rows, ids = [requests for requests, _ in turn], [own for _, both in turn for own in both]
        found = {}
        for who, pool in rivals.items():
            seconds, found[who] = pool.submit(measure, rows, ids).result()
            if number:
                rates[who].append((len(ids) if scores else sum(found[who])) / seconds)
        if scores and number:
            apart += [abs(a - b) for a, b in zip(found["ours"], found["plain"], strict=True)]
            prompts += ids
        if number:
            print("  " + ", ".join(f"{who} {rates[who][-1]:.1f}" for who in rivals), flush=True)
    medians = {who: statistics.median(own) for who, own in rates.items()}
    ratios = {who: statistics.median(a / b for a, b in zip(rates["ours"], rates[who], strict=True)) for who in rivals}
    line = ", ".join(f"{who} {rate:.1f}" for who, rate in medians.items())
    print(
        f"{name}: {line} {'labels' if scores else 'tokens'}/s; ours is "
        + ", ".join(f"{r:.2f} x {w}" for w, r in ratios.items())
    )
    result: dict[str, Any] = {"task": name, "per_second": medians, "ratio": ratios, "rounds": rates}
    if scores:
        result["label_difference"] = {"mean": statistics.fmean(apart), "max": max(apart)}
        result["prompt_tokens"] = statistics.fmean(map(len, prompts))
        result["shared_tokens"] = next(n for n, column in enumerate(zip(*prompts, strict=False)) if len(set(column)) > 1)
        print(f"  {result['prompt_tokens']:.0f} tokens a prompt, {result['shared_tokens']} of them in all prompts")
        print(
            f"  soft labels differ from the plain loop's by {max(apart):.4f} at most, {statistics.fmean(apart):.4f} in the mean"
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=next(path for path in DATA if path.exists()))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64, help="comparisons to label in a turn")
    parser.add_argument("--rationales", type=int, default=64, help="comparisons to write about in a turn")
    parser.add_argument("--tokens", type=int, default=512, help="of a rationale at most")
    parser.add_argument(
        "--templates",
        nargs=3,
        default=[VERY_DETAILED, "harmless-detailed", "harmless-base"],
        help="of long, of long-whole and rationales, of both short tasks",
    )
    parser.add_argument("--tasks", nargs="*", default=["long", "short", "long-whole", "short-whole", "greedy", "sampled"])
    parser.add_argument("--rivals", nargs="*", default=list(RIVALS))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()

    from rlaif.engines.chat import Chat, load_tokenizer
    from rlaif.engines.embedded import embedded_model

    model = str(embedded_model())
    chat = Chat(load_tokenizer(model), "embedded")
    if find_spec("vllm") is None:
        print("vLLM is not installed here: compared with the plain loop only (make .venv-vllm/ready)")
    names = [who for who in given.rivals if who != "vllm" or find_spec("vllm")]
    spawn = multiprocessing.get_context("spawn")
    rivals = {who: ProcessPoolExecutor(1, spawn, start, (who, model)) for who in names}
    very, detailed, short = given.templates
    tasks: dict[str, tuple[str, str, str, int, dict[str, Any]]] = {
        "long": (f"labels, {Path(very).stem}", very, "ending", given.rows, {}),
        "short": (f"labels, {short}", short, "ending", given.rows, {}),
        "long-whole": (f"labels, {detailed}, whole rows", detailed, "ending", given.rows, {}),
        "short-whole": (f"labels, {short}, whole rows", short, "ending", given.rows, {}),
        "greedy": ("rationales, temperature 0", detailed, "thinking", given.rationales, {"max_tokens": given.tokens}),
        "sampled": (
            "rationales, temperature 1",
            detailed,
            "thinking",
            given.rationales,
            {"max_tokens": given.tokens, "temperature": 1.0},
        ),
    }
    found = []
    try:
        for task in given.tasks:
            name, template, ending, size, how = tasks[task]
            asked = questions(given.data, template, ending, how, chat, LONGEST.get(task, READ))
            first = list(tasks).index(task) * len(asked) // len(tasks)  # other rows for each, for vLLM caches what it has read
            asked = asked[first:] + asked[:first]
            found.append(compare(name, asked, size, given.rounds, rivals))
        if given.json:
            facts = {
                "model": "embedded",
                "dtype": "bf16",
                "threads": os.cpu_count(),
                "data": given.data.name,
                "rows": given.rows,
            }
            given.json.write_text(json.dumps({**facts, "results": found}, indent=2) + "\n")
    finally:
        for pool in rivals.values():
            pool.submit(stop)
            pool.shutdown()


if __name__ == "__main__":
    sys.exit(main())
