"""transformers' own model: what is exported, what is compared with, and the mode eager."""

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from common.errors import UsageError
from common.model.resolve import read_config
from common.model.target import Target


def load_model(target: Target, dtype: str | None = None):
    """Return transformers' model in eval mode on its device; gradients are off from here on."""
    target.checkpoint.require_weights()
    # its progress bar would mix with ours, and its advice is about flags we pass on purpose
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(
        target.checkpoint.folder,
        config=read_config(target.checkpoint.folder),
        dtype=getattr(torch, dtype or target.dtype),
        attn_implementation="sdpa",
        local_files_only=True,
        # straight to the GPU: no second copy of the weights in host memory
        device_map="cuda:0" if target.device == "cuda" else None,
    )
    return model.eval()


@torch.no_grad()
def eager_logits(model, ids: list[int], count: int) -> torch.Tensor:
    """Return (count, vocab) float32 on the host: those after each of the last `count` ids.

    Raises UsageError where the model itself overflows in its dtype, as some do in float16.
    """
    row = torch.tensor([ids], device=model.device)  # (1, tokens) int64
    logits = model(row, use_cache=False, logits_to_keep=count).logits[0].float().cpu()
    if not logits.isfinite().all():
        dtype = str(model.dtype).removeprefix("torch.")
        raise UsageError(
            f"transformers' own model has logits in {dtype} that are no finite numbers, uncompiled "
            "as it is: use --dtype bfloat16 or float32"
        )
    return logits
