"""Which weights a checkpoint folder holds, told in milliseconds.

A package carries the weights it was built from, and fine-tunes of one model share its
configuration: without this, `--model-id OTHER` would answer with the wrong model's weights.
"""

import hashlib
import json
from pathlib import Path

_MAX_HEADER_BYTES = 100 * 2**20  # as the safetensors format allows
_SAMPLE_BYTES = 4096  # of each tensor: a fine-tune that changes a tensor changes its beginning


def weights_fingerprint(folder: Path) -> str | None:
    """Return a digest of every tensor's name, shape, dtype and first bytes; None without weights.

    Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes.
    """
    digests = {}
    for path in sorted(folder.glob("*.safetensors")):
        digests |= _tensor_digests(path)
    if not digests:
        return None
    text = json.dumps(digests, sort_keys=True)  # the same however the tensors are cut into files
    return hashlib.sha256(text.encode()).hexdigest()


def _tensor_digests(path: Path) -> dict[str, str]:
    digests = {}
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, _MAX_HEADER_BYTES)))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            file.seek(8 + length + begin)
            digest = hashlib.sha256(f"{entry['dtype']} {entry['shape']}".encode())
            digest.update(file.read(min(_SAMPLE_BYTES, end - begin)))
            digests[name] = digest.hexdigest()
    return digests
