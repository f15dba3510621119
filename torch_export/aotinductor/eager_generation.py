"""The mode to compare with: Hugging Face `generate` as it is, without any compilation."""

import time
from typing import TYPE_CHECKING

import torch

from aotinductor.base_generation import Prompt
from common.devices import synchronize
from common.measures import Request
from common.stopwatch import FirstTokenClock

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def serve(model: "PreTrainedModel", prompt: Prompt) -> tuple[Request, list[int]]:
    """Generate once; return the timing and the new token ids, a stop token included."""
    from transformers import GenerationConfig

    clock = FirstTokenClock()
    synchronize(model.device)
    began = time.monotonic()
    ids = torch.tensor([prompt.token_ids], device=model.device)  # (1, prompt) int64
    # every choice is set, so that none is left to the checkpoint's own defaults
    model.generation_config = GenerationConfig(
        max_new_tokens=prompt.max_new_tokens,
        eos_token_id=list(prompt.stop_ids) or None,
        pad_token_id=prompt.padding_id,
    )
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        disable_compile=True,
        streamer=clock,
    )  # (1, prompt + new_tokens) int64
    new_ids = output[0, ids.shape[1] :].tolist()
    synchronize(model.device)
    ended = time.monotonic()
    ttft = None if clock.first_token_at is None else clock.first_token_at - began
    return Request(ended - began, ttft, len(new_ids)), new_ids
