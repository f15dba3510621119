"""Loading the Hugging Face model of a checkpoint folder."""

from typing import TYPE_CHECKING

from common.checkpoints import Checkpoint

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load_model(
    checkpoint: Checkpoint, device: "torch.device", dtype: "torch.dtype"
) -> "PreTrainedModel":
    """Return the model in eval mode on `device`; gradients are off for the whole process."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    # its progress bar would mix with ours, and its advice is about flags we pass on purpose
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint.folder,
        dtype=dtype,
        attn_implementation="sdpa",
        local_files_only=True,
        # straight to the GPU: no second copy of the weights in host memory
        device_map=str(device) if device.type == "cuda" else None,
    )
    return model.eval()
