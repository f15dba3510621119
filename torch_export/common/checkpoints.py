"""From `--model-id` to a checkpoint folder: Hub id, local folder or preset, one path for all."""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from common import presets
from common.cli import Console
from common.errors import EnvironmentProblemError, UsageError

# what shapes a Llama's graph; names, dates and token ids in config.json do not
_ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "rms_norm_eps",
    "hidden_act",
    "max_position_embeddings",
)
_FILES = ["*.json", "*.safetensors", "*.jinja"]
_PRESETS_FOLDER = Path(__file__).resolve().parents[1] / "artifacts" / "checkpoints"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder on disk and where it came from."""

    folder: Path
    model_id: str
    revision: str | None

    @cached_property
    def config(self) -> dict:
        return _read_json(self.folder / "config.json")

    @cached_property
    def config_digest(self) -> str:
        """Return a digest of the architecture: equal for every fine-tune of one model."""
        config = self.config
        heads = config["num_attention_heads"]
        rope = config.get("rope_parameters") or {}  # transformers 5 writes one dict for both
        scaling = rope or config.get("rope_scaling") or {}
        known = {name: config.get(name) for name in _ARCHITECTURE} | {
            "num_key_value_heads": config.get("num_key_value_heads") or heads,
            "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
            "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
            "attention_bias": bool(config.get("attention_bias", False)),
            "mlp_bias": bool(config.get("mlp_bias", False)),
            "rope_theta": rope.get("rope_theta") or config.get("rope_theta"),
            "rope_scaling": {k: v for k, v in scaling.items() if k not in ("rope_theta", "type")},
        }
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        generation = self.folder / "generation_config.json"
        settings = _read_json(generation) if generation.exists() else {}
        eos = settings.get("eos_token_id", self.config.get("eos_token_id"))
        if eos is None:
            return ()
        return tuple(eos) if isinstance(eos, list) else (eos,)

    def describe(self) -> dict:
        """Return what an artifact's metadata says of the model it was built from."""
        return {
            "id": self.model_id,
            "revision": self.revision,
            "config_digest": self.config_digest,
        }


def resolve_checkpoint(model_id: str, console: Console) -> Checkpoint:
    """Return the checkpoint for `--model-id`, downloading or materialising it when needed."""
    if presets.is_preset(model_id):
        return _preset(model_id, console)
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(f"{folder} is no checkpoint folder: it has no config.json")
        digest = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()[:12]
        return Checkpoint(folder.resolve(), model_id, f"config-{digest}")
    return _download(model_id, console)


def _preset(name: str, console: Console) -> Checkpoint:
    if name not in presets.CONFIGS:
        known = ", ".join(presets.CONFIGS)
        raise UsageError(f"no preset is called {name!r}: choose from {known}")
    # one set of big checkpoints can serve both folders
    parent = Path(os.environ.get("LLAMA_PRESETS", _PRESETS_FOLDER))
    folder = parent / presets.folder_name(name)
    presets.materialize(presets.CONFIGS[name], folder, console)
    console.say(f"{name} has random weights: its text is noise, its timing is real")
    return Checkpoint(folder.resolve(), name, folder.name)


def _download(model_id: str, console: Console) -> Checkpoint:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        folder = Path(snapshot_download(model_id, allow_patterns=_FILES, ignore_patterns="*/*"))
    except HFValidationError as error:
        raise UsageError(
            f"{model_id!r} is neither a folder here, nor a preset, nor a Hub id: {_line(error)}"
        ) from error
    except GatedRepoError as error:  # a subclass of RepositoryNotFoundError: first
        raise EnvironmentProblemError(
            f"{_line(error)} Ask for access on its Hub page, then set HF_TOKEN; "
            "or try --model-id random:3b, the same shape without a licence"
        ) from error
    except RepositoryNotFoundError as error:
        raise UsageError(f"the Hub has no model {model_id!r}: {_line(error)}") from error
    # the Hub's own error has its HTTP client's for a base, and what httpx raises is no OSError
    except (
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        OSError,
        *HfHubHTTPError.__bases__,
        UnicodeEncodeError,  # a token that no header can carry
    ) as error:
        raise EnvironmentProblemError(
            f"{model_id} is not in the Hub cache and could not be downloaded: {_line(error)} "
            "Try --model-id random:tiny, which needs no network"
        ) from error
    return Checkpoint(folder, model_id, folder.name)


def _line(error: Exception) -> str:
    """Return the error's text on one line, without the user's token, which a bad header shows."""
    from huggingface_hub import get_token

    text, token = str(error), get_token()
    if token:
        for form in (token, repr(token)[1:-1], repr(token.encode())[2:-1]):
            text = text.replace(form, "<token>")
    return " ".join(text.split())


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {_line(error)}") from error
