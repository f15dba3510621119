"""transformers' own model: what is exported, what is compared with, and the mode eager."""

import logging
import warnings

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from common.cli import Console
from common.model.target import Target


def load_model(target: Target, dtype: str | None = None):
    """Return transformers' model in eval mode on its device; gradients are off from here on."""
    # its progress bar would mix with ours, and its advice is about flags we pass on purpose
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(
        target.checkpoint.folder,
        dtype=getattr(torch, dtype or target.dtype),
        attn_implementation="sdpa",
        local_files_only=True,
        # straight to the GPU: no second copy of the weights in host memory
        device_map="cuda:0" if target.device == "cuda" else None,
    )
    return model.eval()


def quieten(device: str, console: Console) -> None:
    """Keep off stderr what the compiler says that is no news."""
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    if console.quiet:
        warnings.filterwarnings("ignore", module=r"(torch|triton)\.")
    if console.quiet or device != "cuda":  # a skipped CUDA graph is news where there is a GPU
        for name in ("torch._inductor", "torch._dynamo", "torch.utils.cpp_extension"):
            logging.getLogger(name).setLevel(logging.ERROR)
