"""vLLM in this process: its scheduler decides what runs together, so requests are handed over as they come."""

from __future__ import annotations

import os
from itertools import count
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # read by vllm when it is imported
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB; read by builds for the CPU only

import torch
from transformers import AutoConfig

from rlaif.engines.chat import Chat, cannot_load, first_words, load_tokenizer
from rlaif.records import Completion, FatalError, Request, RowError, UsageError, digest

try:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.exceptions import EngineDeadError
except ImportError as missing:
    raise FatalError("vLLM is not installed: pip install 'rlaif[vllm]'") from missing

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
...
