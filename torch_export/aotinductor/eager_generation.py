"""The mode to compare with: Hugging Face `generate` as it is, without any compilation."""

import time
from typing import TYPE_CHECKING

import torch
from common.devices import synchronize
from common.measures import Request

from aotinductor.base_generation import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FirstTokenClock:
    """A `generate` streamer that notes when the first new token reached the host."""

    def __init__(self):
        self.first_token_at: float | None = None
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        # generate hands over the prompt first, then each new token, copied to the host
        if self._prompt_seen and self.first_token_at is None:
            self.first_token_at = time.monotonic()
        self._prompt_seen = True

    def end(self) -> None:
        pass


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
