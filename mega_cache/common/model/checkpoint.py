"""From `--model-id` to a checkpoint folder: Hub id, local folder or preset, one path for all.

A preset has a real model's shape and random weights. It is written once as a checkpoint folder like
any other, with a byte-level tokenizer, and needs no download and no licence.
"""

import copy
import hashlib
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from common.cli import Console
from common.errors import EnvironmentProblemError, UsageError
from common.machine import package_version

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
_PRESETS_FOLDER = Path(__file__).resolve().parents[2] / "artifacts" / "checkpoints"


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
        rope = config.get("rope_parameters") or {}  # transformers 5 writes one dict for both
        scaling = rope or config.get("rope_scaling") or {}
        switches = ("tie_word_embeddings", "attention_bias", "mlp_bias")
        known = {name: config.get(name) for name in _ARCHITECTURE}
        known |= {name: bool(config.get(name)) for name in switches}
        known |= {
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "rope_theta": rope.get("rope_theta") or config.get("rope_theta"),
            "rope_scaling": {k: v for k, v in scaling.items() if k not in ("rope_theta", "type")},
        }
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    @property
    def layers(self) -> int:
        return self.config["num_hidden_layers"]

    @property
    def layer_digest(self) -> str:
        return self.config_digest

    @property
    def kv_heads(self) -> int:
        return self.config.get("num_key_value_heads") or self.config["num_attention_heads"]

    @property
    def head_dim(self) -> int:
        config = self.config
        return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        generation = self.folder / "generation_config.json"
        settings = _read_json(generation) if generation.exists() else {}
        eos = settings.get("eos_token_id", self.config.get("eos_token_id"))
        if eos is None:
            return ()
        return tuple(eos) if isinstance(eos, list) else (eos,)


def resolve_checkpoint(model_id: str, console: Console) -> Checkpoint:
    """Return the checkpoint for `--model-id`, downloading or materialising it when needed."""
    if model_id.startswith("random:"):
        if model_id not in CONFIGS:
            raise UsageError(f"no preset is called {model_id!r}: choose from {', '.join(CONFIGS)}")
        # one set of big checkpoints can serve both folders
        parent = Path(os.environ.get("LLAMA_PRESETS", _PRESETS_FOLDER))
        folder = materialize(CONFIGS[model_id], parent / folder_name(model_id), console)
        console.say(f"{model_id} has random weights: its text is noise, its timing is real")
        return Checkpoint(folder.resolve(), model_id, folder.name)
    folder = Path(model_id).expanduser()
    if not folder.is_dir():
        folder = _download(model_id)
        return Checkpoint(folder, model_id, folder.name)
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} is no checkpoint folder: it has no config.json")
    digest = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()[:12]
    return Checkpoint(folder.resolve(), model_id, f"config-{digest}")


def _download(model_id: str) -> Path:
    from huggingface_hub import errors, get_token, snapshot_download

    def line(error: Exception) -> str:
        """Return the Hub's words on one line, without the token, which a bad header shows."""
        text, token = str(error), get_token()
        if token:
            for form in (token, repr(token)[1:-1], repr(token.encode())[2:-1]):
                text = text.replace(form, "<token>")
        return " ".join(text.split())

    try:
        return Path(snapshot_download(model_id, allow_patterns=_FILES, ignore_patterns="*/*"))
    except errors.GatedRepoError as error:  # a subclass of RepositoryNotFoundError: first
        raise EnvironmentProblemError(
            f"{line(error)} Ask for access on its Hub page, then set HF_TOKEN; "
            "or try --model-id random:3b, the same shape without a licence"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UsageError(
            f"{model_id!r} is neither a folder here, nor a preset, nor a Hub id: {line(error)}"
        ) from error
    # the Hub's own error has its HTTP client's for a base, and what httpx raises is no OSError;
    # UnicodeEncodeError: a token that no header can carry
    except (OSError, UnicodeEncodeError, *errors.HfHubHTTPError.__bases__) as error:
        raise EnvironmentProblemError(
            f"{model_id} is not in the Hub cache and could not be downloaded: {line(error)} "
            "Try --model-id random:tiny, which needs no network"
        ) from error


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error


# --- presets ---------------------------------------------------------------------------------

# raised when the way weights are drawn changes, so that no old folder is taken for a new one
_RECIPE = 2
# ids 0 to 255 are the bytes
_SPECIAL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def _shape(hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, factor=32.0, **other):
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        # At the usual 0.02 a random tied model repeats its last token whatever the context, so that
        # a broken attention passes every test. With std * sqrt(hidden) at 2.4 it reacts to every
        # token.
        "initializer_range": 2.4 / hidden**0.5,
        "bos_token_id": 256,
        "eos_token_id": 259,
    } | other


CONFIGS = {
    "random:tiny": _shape(256, 704, 4, 8, 2, 32, 512, dtype="float32"),
    "random:1b": _shape(2048, 8192, 16, 32, 8, 64, 128256),
    "random:3b": _shape(3072, 8192, 28, 24, 8, 128, 128256),
    "random:8b": _shape(4096, 14336, 32, 32, 8, 128, 128256, 8.0, tie_word_embeddings=False),
}


def folder_name(preset: str) -> str:
    """Return a name that changes with everything that shapes the checkpoint's files."""
    # transformers 5 writes the rope settings under a name that 4 does not read
    writer = package_version("transformers").partition(".")[0]
    text = json.dumps([_RECIPE, writer, CONFIGS[preset]], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{preset.replace(':', '-')}-{digest}"


def materialize(config: dict[str, Any], folder: Path, console: Console, seed: int = 0) -> Path:
    """Write the checkpoint `folder` for this configuration unless it is there; return it.

    Made beside its final place and renamed, so that a folder of this name is always whole.
    """
    if folder.is_dir():
        return folder
    # imported here: every start of a preset comes by, and writes nothing
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent)
    with FileLock(folder.with_name(f".{folder.name}.lock")), draft as temporary:
        if not folder.is_dir():  # else another process was faster
            made = Path(temporary, "checkpoint")
            console.say(f"writing random weights to {folder}")
            _write_model(config, seed, made)
            _write_tokenizer(made)
            made.rename(folder)
    return folder


def _write_model(config: dict[str, Any], seed: int, folder: Path) -> None:
    """Write configuration and random weights: the same ones on every machine.

    Each weight is drawn on the CPU from the seed and its own name, so neither a GPU nor the number
    of threads changes it.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    own = copy.deepcopy(config)  # transformers 5 writes into the rope settings that it is given
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**own))
    dtype = getattr(torch, config["dtype"])

    def draw(name: str) -> torch.Tensor:
        shape = model.get_parameter(name).shape
        if "norm" in name:
            return torch.ones(shape, dtype=dtype)
        own_seed = hashlib.sha256(f"{seed} {name}".encode()).digest()[:7]
        generator = torch.Generator().manual_seed(int.from_bytes(own_seed, "big"))
        weight = torch.randn(shape, generator=generator)
        return weight.mul_(config["initializer_range"]).to(dtype)

    names = [name for name, _ in model.named_parameters()]  # a tied weight comes once
    with ThreadPoolExecutor() as pool:  # random numbers are drawn outside the GIL
        weights = dict(zip(names, pool.map(draw, names), strict=True))
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)


def _write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer: one token a byte, then the special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _SPECIAL[0],
        "eos_token": _SPECIAL[-1],
        "chat_template": _CHAT_TEMPLATE,
        "model_max_length": 131072,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
