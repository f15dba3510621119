"""Which weights a checkpoint folder holds, told in milliseconds.

A package carries the weights it was built from, and fine-tunes of one model share its
configuration: without this, `--model-id OTHER` would answer with the wrong model's weights.
"""

import hashlib
import json
from pathlib import Path

_SAMPLE_BYTES = 4096  # of each tensor: a fine-tune that changes a tensor changes its beginning


def weights_fingerprint(folder: Path) -> str | None:
    """Return a digest of every tensor's name, shape, dtype and first bytes; None without weights.

    It is the same however the tensors are cut into files.
    """
    from common.weights import list_checkpoint

    try:
        tensors = list_checkpoint(folder)
    except FileNotFoundError:  # configuration and tokenizer only
        return None
    digests = {}
    for name, stored in tensors.items():
        with open(stored.path, "rb") as file:
            file.seek(stored.begin)
            sample = file.read(min(_SAMPLE_BYTES, stored.end - stored.begin))
        digests[name] = hashlib.sha256(f"{stored.dtype} {stored.shape}".encode() + sample)
    text = json.dumps({name: digests[name].hexdigest() for name in sorted(digests)})
    return hashlib.sha256(text.encode()).hexdigest()
