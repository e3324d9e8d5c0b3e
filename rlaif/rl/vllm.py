"""Drawing responses by vLLM, in this process and on the same GPU, with the policy's weights handed over in memory."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlaif.engines.chat import cannot_load
from rlaif.engines.vllm import DTYPES
from rlaif.records import FatalError, UsageError

POLICY = "default"
"""The adapter that is the policy's; a model may hold others, such as a value network's."""


class VllmSampler:
    """A `Sampler` (`rlaif.rl.generate`) that draws by vLLM, which holds a second copy of the weights.

    A seed settles a response's draws whatever stands beside it, except where rounding tips a close one; it draws others than
    it would in transformers. Until the first `sync` the weights are those of `model`, a folder or a name on the hub.

    dtype: `bf16` or `fp32`; the last layer is computed in fp32 in any case. max_length: tokens of a prompt with its response.
    device: the kind that vLLM was built for, and of GPUs the first that can be seen ($CUDA_VISIBLE_DEVICES chooses).
    gpu_memory_utilization: share of the GPU's memory for vLLM's weights and cache. A build of vLLM for the CPU takes
    $VLLM_CPU_KVCACHE_SPACE GiB for its cache, 2 unless set. trust_remote_code: run the code that comes with a model.

    Raises: UsageError for an unknown dtype, a device that vLLM cannot take, or several processes; FatalError where vLLM is
    missing or cannot start.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str,
        max_length: int,
        device: str | None = None,
        gpu_memory_utilization: float = 0.3,
        trust_remote_code: bool = False,
    ) -> None:
        if dtype not in DTYPES:
            raise UsageError(f"unknown dtype '{dtype}': choose one of {', '.join(DTYPES)}")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError("generator: vllm goes with a single process; with several, use transformers")
        if find_spec("vllm") is None:
            raise FatalError("vLLM is not installed: pip install 'rlaif[vllm]'")
        with _undisturbed():
            _check_device(device)
            try:
                self._llm: Any = _start(
                    model=model,
                    dtype=DTYPES[dtype],
                    max_model_len=max_length,
                    gpu_memory_utilization=gpu_memory_utilization,
                    trust_remote_code=trust_remote_code,
                )
            except Exception as error:
                raise cannot_load(model, error) from error

    def sync(self, model: Any) -> None:
        """Take the weights of `model`, a causal language model of transformers or a PEFT model, and leave that unchanged.

        Raises: UsageError for adapters that untie the output layer from the input embeddings, which vLLM keeps tied.
        """
        _check_tied(model)
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": merged_weights(model)})
        self._llm.apply_model(_repack)
        self._llm.reset_prefix_cache()  # keys and values of the old weights

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        max_new_tokens: int,
        temperature: float,
        ends: Sequence[int],
    ) -> list[list[int]]:
        from vllm import SamplingParams

        wanted = [
            SamplingParams(
                max_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                stop_token_ids=list(ends),
                ignore_eos=True,  # `ends` alone says what ends a response
                detokenize=False,
            )
            for seed in seeds
        ]
        answers = self._llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], wanted, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    def close(self) -> None:
        """Give the memory back."""
        if self._llm:
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = None


@torch.no_grad()
def merged_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of a checkpoint of `model`, by its name there, with the policy's adapter merged; `model` stays as it is.

    One layer is merged at a time, in a copy: merging in place and taking it back would round the weights a little each time.
    Tensors that layers share come once.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    seen: set[Tensor] = set()
    for prefix, layer in _layers(model.get_base_model() if isinstance(model, PeftModel) else model):
        if isinstance(layer, BaseTunerLayer):
            copy = deepcopy(layer)
            copy.merge(adapter_names=[POLICY])
            yield from ((prefix + name, tensor.detach()) for name, tensor in _own_tensors(copy.get_base_layer()))
            continue
        for name, tensor in _own_tensors(layer):
            if tensor not in seen:
                seen.add(tensor)
                yield prefix + name, tensor.detach()


def _layers(module: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each module that a checkpoint of the policy has tensors of, and the prefix of their names; adapted layers as such."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        module = dict(module.modules_to_save).get(POLICY, module.original_module)
    yield prefix, module
    if not isinstance(module, BaseTunerLayer):
        for name, child in module.named_children():
            yield from _layers(child, f"{prefix}{name}.")


def _own_tensors(module: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of this very module that a checkpoint holds."""
    yield from module.named_parameters(recurse=False)
    passing = module._non_persistent_buffers_set
    yield from ((name, buffer) for name, buffer in module.named_buffers(recurse=False) if name not in passing)


def _check_tied(model: Any) -> None:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    if not isinstance(model, PeftModel) or not model.get_base_model().config.tie_word_embeddings:
        return
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if isinstance(layer, BaseTunerLayer | ModulesToSaveWrapper):
            raise UsageError(
                "lora.targets: this model's output layer is its input embeddings, and adapters on one of them would part the "
                "two, which vLLM cannot: name other layers, or generate by transformers"
            )


def _repack(model: Any) -> None:
    """vLLM on a CPU computes logits from a packed copy of the output layer, which it leaves as it was where layers are tied."""
    head = getattr(model, "lm_head", None)
    if head is not None and head.weight.device.type == "cpu":
        head.quant_method.process_weights_after_loading(head)


def _start(**settings: Any) -> Any:
    """vLLM in this process, for only there can weights be handed over in memory: some seconds."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns of each weight that it converts
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the threads are the training's too
    from vllm import LLM
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        # A prompt that is computed in parts makes vLLM rewind its request's source of randomness, which torch cannot on a CPU.
        settings |= {"enable_chunked_prefill": False}
    return LLM(
        hf_overrides={"head_dtype": "float32"},
        skip_tokenizer_init=True,
        enable_prefix_caching=True,
        enforce_eager=current_platform.is_cpu(),
        disable_log_stats=True,
        use_tqdm_on_load=False,
        **settings,
    )


def _check_device(device: str | None) -> None:
    from vllm.platforms import current_platform

    kind = current_platform.device_type
    if device not in (None, "auto", kind, f"{kind}:0"):
        raise UsageError(f"device: vLLM runs on {kind} here, and not on '{device}'; CUDA_VISIBLE_DEVICES chooses among GPUs")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """vLLM seeds every source of randomness as it starts in this process, which the run's own must not notice."""
    name = "VLLM_ENABLE_V1_MULTIPROCESSING"
    before, python, numpy = os.environ.get(name), random.getstate(), np.random.get_state()
    os.environ[name] = "0"
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
