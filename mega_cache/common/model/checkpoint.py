"""From `--model-id` to a checkpoint: Hub id, local folder or preset, one path for all.

What the checkpoint is, transformers says (`common.model.resolve`): once. The answer is kept by
digest of the files that it came from, in an artifact's metadata for the checkpoint that it was
built from, and for any other in the user's cache.
"""

import ctypes
import fnmatch
import hashlib
import json
import os
import re
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from common.cli import Console
from common.errors import EnvironmentProblemError, UsageError
from common.machine import package_version
from common.model.stored import Stored, damaged, list_stored
from common.model.weights import map_tensor

_HUB_FILES = [
    "*.json", "*.jinja", "model.safetensors", "model-*-of-*.safetensors", "tokenizer.model",
]  # fmt: skip
# what transformers' answer depends on
_ASKED_FILES = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
    "chat_template*", "added_tokens.json", "vocab.*", "merges.txt",
)  # fmt: skip
# raised when an answer of `ask_transformers` has other fields or another meaning
RESOLVER = 2


class Checkpoint:
    """A checkpoint folder on disk, where it came from, and what transformers makes of it."""

    def __init__(
        self, folder: Path, model_id: str, revision: str | None, resolved: dict[str, Any]
    ):  # fmt: skip
        """`resolved`: as `ask_transformers` returns it, and the digest of `files`."""
        self.folder, self.model_id, self.revision = folder, model_id, revision
        self.resolved = resolved

    @property
    def architecture(self) -> dict[str, Any]:
        """What shapes the graphs, equal for every fine-tune of one model."""
        return self.resolved["architecture"] | {"tied": self.tied}

    @property
    def record(self) -> dict[str, Any]:
        """What an artifact's metadata keeps of it: also what its weights say."""
        return self.resolved | {"architecture": self.architecture}

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return tuple(self.resolved["stop_ids"])

    @property
    def layers(self) -> int:
        return self.architecture["layers"]

    @property
    def vocab_size(self) -> int:
        return self.architecture["vocab_size"]

    @cached_property
    def config_digest(self) -> str:
        return _digest(self.architecture)

    @cached_property
    def layer_digest(self) -> str:
        return _digest({k: v for k, v in self.architecture.items() if k != "layers"})

    @cached_property
    def stored(self) -> dict[str, Stored]:
        """What the model reads of the folder's files, by name; {} of a folder without weights."""
        ignored = [re.compile(pattern) for pattern in self.resolved["ignored"]]
        return {
            name: tensor
            for name, tensor in self._held.items()
            if name not in self.aliases and not any(one.search(name) for one in ignored)
        }

    @cached_property
    def _held(self) -> dict[str, Stored]:
        return list_stored(self.folder)

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Further names of one tensor -> its own: `lm_head.weight` where it is tied."""
        return {
            name: own
            for name, own in self.resolved["tied"].items()
            if not (self.resolved["ties_equal_only"] and self._differ(name, own))
        }

    @property
    def tied(self) -> bool:
        return bool(self.aliases)

    @cached_property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that the model reads."""
        texts = dict(self.resolved["parameters"])
        apart = self.resolved["tied"].keys() - self.aliases.keys()
        texts |= {name: texts[self.resolved["tied"][name]] for name in apart}
        return {k: tuple(map(int, v.split("x"))) if v else () for k, v in texts.items()}

    def require_weights(self) -> None:
        """Raise UsageError if the folder holds none, as one may beside a package with its own."""
        if not self.stored:
            raise UsageError(f"{self.folder} has no model.safetensors: {_CONVERT}")

    def check_tensors(self) -> None:
        """Raise UsageError, naming them, if tensors are missing, left over, or of another shape."""
        stored, expected = self.stored, self.parameters
        known = expected.keys() | set(self.resolved["optional"])
        found = {
            "missing": [name for name in expected if name not in stored],
            "left over": [name for name in stored if name not in known],
            "of another shape": [
                f"{name} with shape {list(stored[name].shape)} in place of {list(shape)}"
                for name, shape in expected.items()
                if name in stored and stored[name].shape != shape
            ],
        }
        problems = [
            f"{len(names)} {what}, {', '.join(names[:3])}{', ...' * (len(names) > 3)}"
            for what, names in found.items()
            if names
        ]
        if problems:
            raise UsageError(
                f"the tensors in {self.folder} are not those of the "
                f"{self.architecture['model_type']} model that its "
                f"config.json describes: {'; '.join(problems)}: take the whole checkpoint, as "
                "transformers' save_pretrained writes it"
            )

    def _differ(self, name: str, other: str) -> bool:
        """Say whether both are stored and hold other bytes."""
        if not (name in self._held and other in self._held):
            return False
        one, two = self._held[name], self._held[other]
        if (one.dtype, one.shape) != (two.dtype, two.shape):
            return True
        places = [ctypes.c_void_p(map_tensor(held).address) for held in (one, two)]
        return ctypes.CDLL(None).memcmp(*places, ctypes.c_size_t(one.nbytes)) != 0


_CONVERT = (
    "weights are read from safetensors; convert others with transformers' "
    "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER)"
)


def resolve_checkpoint(
    model_id: str, console: Console, known: dict[str, Any] | None = None
) -> Checkpoint:
    """Return the checkpoint for `--model-id`, downloading or materialising it when needed.

    `known` is what an artifact's metadata says of the checkpoint that it was built from. What
    cannot be right is refused here, by name.
    """
    folder, revision = _find_folder(model_id, console)
    _refuse_formats(folder)
    digest = _files_digest(folder)
    if not (_is_answer(known) and known["files"] == digest):
        known = _recall(digest)
    if known is None:
        for path in folder.glob("*.json"):
            if _asked(path):
                _read_json(path)
        console.say(f"asking transformers what {model_id} is: once, the answer is kept")
        # imported here: a checkpoint that was asked for before starts without it
        from common.model.resolve import ask_transformers

        known = ask_transformers(folder) | {"resolver": RESOLVER, "files": digest}
        _remember(known)
    checkpoint = Checkpoint(folder, model_id, revision, known)
    if checkpoint.stored:
        checkpoint.check_tensors()
    return checkpoint


def _find_folder(model_id: str, console: Console) -> tuple[Path, str]:
    """Return the checkpoint's folder and its revision."""
    if model_id.startswith("random:"):
        from common.model.presets import CONFIGS, materialize, preset_folder

        if model_id not in CONFIGS:
            raise UsageError(f"no preset is called {model_id!r}: choose from {', '.join(CONFIGS)}")
        folder = materialize(CONFIGS[model_id], preset_folder(model_id), console)
        console.say(f"{model_id} has random weights: its text is noise, its timing is real")
        return folder.resolve(), folder.name
    folder = Path(model_id).expanduser()
    if folder.is_file():
        raise UsageError(f"--model-id {folder} is a file: give the checkpoint's folder")
    if not folder.is_dir():
        folder = _download(model_id)
        return folder, folder.name
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} is no checkpoint folder: it has no config.json")
    digest = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()[:12]
    return folder.resolve(), f"config-{digest}"


def _refuse_formats(folder: Path) -> None:
    """Raise UsageError for what no mode can serve and a look at the folder tells."""
    path = folder / "config.json"
    config = _read_json(path)
    for name in ("quantization_config", "compression_config"):
        if told := config.get(name):
            method = told.get("quant_method", "unknown method") if isinstance(told, dict) else told
            raise UsageError(
                f"{path} has a {name} ({method}): quantised checkpoints are not supported; take "
                "the model's original one in bfloat16, float16 or float32"
            )
    pickled = sorted(folder.glob("pytorch_model*.bin"))
    if pickled and not list(folder.glob("model*.safetensors*")):
        raise UsageError(f"{folder} has {pickled[0].name} and no model.safetensors: {_CONVERT}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("no object")
        return found
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, error) from error


def _download(model_id: str) -> Path:
    from huggingface_hub import errors, get_token, snapshot_download

    def line(error: Exception) -> str:
        """Return the Hub's words on one line, without the token, which a bad header shows."""
        text = str(error)
        if token := get_token():
            for form in (token, repr(token)[1:-1], repr(token.encode())[2:-1]):
                text = text.replace(form, "<token>")
        return " ".join(text.split())

    try:
        return Path(snapshot_download(model_id, allow_patterns=_HUB_FILES, ignore_patterns="*/*"))
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


# --- transformers' answers, kept -------------------------------------------------------------


def _files_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if _asked(path) and path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()


def _asked(path: Path) -> bool:
    return any(fnmatch.fnmatch(path.name, pattern) for pattern in _ASKED_FILES)


def _is_answer(known: Any) -> bool:
    return isinstance(known, dict) and known.get("resolver") == RESOLVER


def _cache_folder() -> Path | None:
    """Return the user's folder for answers; None where this user has no home."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base, "llama_artifacts", "checkpoints") if os.path.isabs(base) else None


def _recall(files: str) -> dict[str, Any] | None:
    """Return the answer kept for these files; a damaged one is none."""
    folder = _cache_folder()
    if folder is None:
        return None
    # where there is no transformers an answer of any version will do
    version = package_version("transformers") or "*"
    for path in sorted(folder.glob(f"{files}-{version}.json"), reverse=True):
        with suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(path.read_bytes())
            answer = kept["answer"]
            if kept["sha256"] == _digest(answer) and _is_answer(answer):
                return answer
    return None


def _remember(answer: dict[str, Any]) -> None:
    """Write the answer whole or not at all; a folder that can't be written to is no failure."""
    import tempfile

    folder = _cache_folder()
    if folder is None:
        return
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{answer['files']}-{answer['transformers']}.json"
        text = json.dumps({"sha256": _digest(answer), "answer": answer})
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
