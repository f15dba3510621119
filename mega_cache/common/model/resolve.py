"""Asks transformers, once, what a checkpoint is: the answer is plain data, which JSON keeps.

The only module that does. A start reads the answer, and imports neither torch nor transformers for
it (`common.model.checkpoint` keeps it). Versions differ in here and nowhere else: read in
transformers 4.57 and 5.24.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.errors import EnvironmentProblemError, UsageError
from common.machine import package_version
from common.model.stored import damaged


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# what shapes no graph and no token, of any family's configuration
_NOISE = _words("""
    architectures bos_token_id chunk_size_feed_forward dtype eos_token_id id2label
    initializer_range is_decoder is_encoder_decoder label2id max_length max_position_embeddings
    output_attentions output_hidden_states pad_token_id pretraining_tp problem_type return_dict
    sep_token_id task_specific_params tokenizer_class torch_dtype transformers_version use_cache
    _name_or_path decoder_start_token_id torchscript finetuning_task prefix
""")
# what the architecture's own words say already
_SAID = _words("""
    model_type hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim vocab_size rms_norm_eps hidden_act tie_word_embeddings
    attention_bias mlp_bias rope_theta rope_scaling rope_parameters sliding_window
    use_sliding_window max_window_layers layer_types attention_dropout partial_rotary_factor
""")
# families that those words describe completely
_KNOWN_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# frequencies of these change with the length of the running sequence
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
# what transformers ends in where a file says what it cannot make a model of
_UNREADABLE = (
    LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError, OSError,
)  # fmt: skip
_TOKENIZER_PARTS = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder")


def ask_transformers(folder: Path) -> dict[str, Any]:
    """Return what transformers makes of the checkpoint in `folder`: architecture, rope, tokenizer.

    Raises UsageError for what it cannot read, EnvironmentProblemError where it isn't installed.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise EnvironmentProblemError(
            f"{error}: what {folder} is, transformers must be asked once; start from it where "
            "torch and transformers are installed, and carry ~/.cache/llama_artifacts here"
        ) from error
    logging.set_verbosity_error()  # its advice is about flags of its own
    config = read_config(folder)
    try:
        with torch.device("meta"):  # names and shapes, no memory
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        rope = _rope(model)
        answer = {
            "transformers": package_version("transformers"),
            "architecture": _architecture(config, model, rope),
            "rope": rope,
            "stop_ids": _stop_ids(folder, config),
            **_parameters(model),
        }
    except _UNREADABLE as error:
        raise _refusal(folder / "config.json", error) from error
    return answer | {"tokenizer": _tokenizer(folder)}


def read_config(folder: Path):
    """Return transformers' configuration of the checkpoint; refuse what it would read as another.

    transformers 4 silently ignores the rope settings that 5 writes: theta becomes 10000.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    words = json.loads((folder / "config.json").read_bytes())
    try:
        if _transformers_major() >= 5 or "rope_parameters" not in words:
            return AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        rope = dict(words.pop("rope_parameters") or {})
        if any(isinstance(value, dict) for value in rope.values()):
            raise ValueError(
                "its rope_parameters are one for each kind of layer, which needs transformers 5"
            )
        for name in ("rope_theta", "partial_rotary_factor"):
            if name in rope:
                words[name] = rope.pop(name)
        scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
        words["rope_scaling"] = rope if scaled else None
        return CONFIG_MAPPING[words["model_type"]].from_dict(words)
    except _UNREADABLE as error:
        raise _refusal(folder / "config.json", error) from error


def _refusal(path: Path, error: Exception) -> UsageError:
    text = " ".join(str(error).split())[:300] or type(error).__name__
    return UsageError(f"transformers {package_version('transformers')} cannot read {path}: {text}")


# --- architecture ----------------------------------------------------------------------------


def _architecture(config, model, rope: dict | None) -> dict[str, Any]:
    """Return what shapes the model's graphs, spelled alike whatever version wrote or read it."""
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    norm = (getattr(text, name, None) for name in ("rms_norm_eps", "layer_norm_eps", "norm_eps"))
    modules = [name for name, _ in model.named_modules()]
    biased = {
        name.rpartition(".")[0] for name, _ in model.named_parameters() if name.endswith(".bias")
    }
    found = {
        "model_type": config.model_type,
        "hidden_size": text.hidden_size,
        "intermediate_size": getattr(text, "intermediate_size", None),
        "layers": text.num_hidden_layers,
        "heads": heads,
        "kv_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
        "vocab_size": text.vocab_size,
        "norm_eps": next((float(eps) for eps in norm if eps is not None), None),
        "hidden_act": getattr(text, "hidden_act", None),
        # of one layer: `self_attn.q_proj`
        "biases": sorted({".".join(name.split(".")[-2:]) for name in biased}),
        "qk_norm": any(name.endswith((".q_norm", ".k_norm")) for name in modules),
        "windows": _windows(text),
        "rope": _rope_words(text, rope),
    }
    if config.model_type not in _KNOWN_FAMILIES:
        own = type(config)().to_dict()  # what fine-tunes add to the file is not the family's
        values = config.to_dict()
        rest = (own.keys() & values.keys()) - _NOISE - _SAID
        found["other"] = {name: values[name] for name in sorted(rest)}
    return json.loads(json.dumps(found, default=str))


def _windows(text) -> dict[str, Any] | None:
    """Return the sliding window and the layers that have it; None if every layer sees all."""
    window, layers = getattr(text, "sliding_window", None), range(text.num_hidden_layers)
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention" for _ in layers]
    if all(kind == "full_attention" for kind in kinds):
        return None
    return {"window": window, "kinds": list(kinds)}


def _rope_words(text, rope: dict | None) -> dict[str, Any] | None:
    """Return the rope settings under one name each, numbers as floats, defaults written out."""
    given = getattr(text, "rope_parameters", None)
    if given is None:  # transformers 4
        if rope is None or not hasattr(text, "rope_theta"):
            return None
        given = {"rope_theta": text.rope_theta, **(getattr(text, "rope_scaling", None) or {})}
        if getattr(text, "partial_rotary_factor", None) is not None:
            given["partial_rotary_factor"] = text.partial_rotary_factor
    if any(isinstance(value, dict) for value in given.values()):
        return {kind: _one_rope(text, own or {}) for kind, own in sorted(given.items())}
    return _one_rope(text, given)


def _one_rope(text, given: dict[str, Any]) -> dict[str, Any]:
    kind = given.get("rope_type") or given.get("type") or "default"
    longest = "original_max_position_embeddings"
    words = {k: v for k, v in given.items() if k not in ("type", "rope_type") and v is not None}
    if kind == "default":
        words = {k: v for k, v in words.items() if k in ("rope_theta", "partial_rotary_factor")}
    elif kind in ("llama3", "yarn", "longrope"):
        words.setdefault(longest, getattr(text, longest, None) or text.max_position_embeddings)
    elif kind == "dynamic":
        words[longest] = text.max_position_embeddings
    if words.get("partial_rotary_factor") == 1:
        del words["partial_rotary_factor"]
    floats = {
        name: float(value) if isinstance(value, int | float) and value is not True else value
        for name, value in words.items()
    }
    return {"rope_type": kind, **dict(sorted(floats.items()))}


def _rope(model) -> dict[str, Any] | None:
    """Return the frequencies as transformers computes them; None where there is not one set."""
    for name, module in model.named_modules():
        if name.endswith("rotary_emb") and hasattr(module, "inv_freq"):
            # anew: that of the model is on the meta device
            made = type(module)(config=model.config.get_text_config(decoder=True))
            kind = getattr(made, "rope_type", "default")
            return {
                "type": kind,
                "depends_on_length": kind in _LENGTH_DEPENDENT_ROPE,
                # (rotary width / 2,): JSON keeps float32 exactly
                "inv_freq": made.inv_freq.double().tolist(),
                "attention_scaling": float(made.attention_scaling),
            }
    return None


def _parameters(model) -> dict[str, Any]:
    """Return names and shapes of all that a checkpoint must hold, and what it may hold besides."""
    named = list(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in named:
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    buffers = {name for name, _ in model.named_buffers()}
    kept = set(model.state_dict())
    shapes = {name: one.shape for name, one in (*named, *model.named_buffers())}

    def patterns(*attributes: str) -> list[str]:
        return sorted({p for a in attributes for p in (getattr(model, a, None) or ())})

    optional = patterns("_keys_to_ignore_on_load_missing")
    names = sorted(kept - tied.keys())
    required = [name for name in names if not _matches(optional, name)]
    return {
        "parameters": {name: "x".join(map(str, shapes[name])) for name in required},
        "optional": [name for name in names if _matches(optional, name)],
        "tied": tied,
        # transformers 5 leaves two tensors apart whose values in the file differ, 4 ties whatever
        "ties_equal_only": _transformers_major() >= 5,
        "ignored": [
            *patterns("_keys_to_ignore_on_load_unexpected"),
            # rope frequencies, which early checkpoints hold, are computed since
            r"rotary_emb\.inv_freq",
            *(f"^{re.escape(name)}$" for name in sorted(buffers - kept)),
        ],
    }


def _matches(patterns: Iterable[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _stop_ids(folder: Path, config) -> list[int]:
    """Return the ids that end a text, as `generate` has them."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
    else:
        generation = GenerationConfig.from_model_config(config)
    stops = generation.eos_token_id
    return [] if stops is None else stops if isinstance(stops, list) else [stops]


# --- tokenizer -------------------------------------------------------------------------------


def _tokenizer(folder: Path) -> dict[str, Any]:
    """Return how transformers' tokenizer differs from tokenizer.json, and its chat template."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UsageError(
            f"{folder} has no tokenizer.json, the fast tokenizer: write it with transformers' "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    try:
        stored = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more special
        raise damaged(path, error) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # as above: it hands the same on
        raise _refusal(path, error) from error
    if not tokenizer.is_fast:
        raise UsageError(
            f"{folder} has no fast tokenizer: transformers reads it as {type(tokenizer).__name__}"
        )
    backend = tokenizer.backend_tokenizer
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return {
        "changes": _changes(stored, backend),
        "split_special_tokens": bool(getattr(tokenizer, "split_special_tokens", False)),
        "cleans_up": _cleans_up(tokenizer),
        "special": tokenizer.special_tokens_map,  # bos_token -> its text, and lists of further ones
        "chat_template": template,
    }


def _changes(stored, backend) -> dict[str, Any]:
    """Return the sections of tokenizer.json that transformers has otherwise, as it has them.

    Of the model, which holds the vocabulary, only those of its fields.
    """
    theirs, own = (json.loads(one.to_str()) for one in (backend, stored))
    changes = {name: theirs[name] for name in _TOKENIZER_PARTS if theirs[name] != own[name]}
    model, was = theirs["model"], own["model"]
    if model != was:
        changes["model"] = {k: v for k, v in model.items() if k not in was or v != was[k]}
    return changes


def _cleans_up(tokenizer) -> bool:
    """Return whether decoding ends in `clean_up_tokenization`: ` .` becomes `.` and so on."""
    wanted = bool(tokenizer.clean_up_tokenization_spaces)
    bpe = type(tokenizer.backend_tokenizer.model).__name__ == "BPE"
    if _transformers_major() >= 5 and bpe:
        # there it corrupts the text, so 5 does it for those alone who insist
        name = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
        wanted = wanted and bool(getattr(tokenizer, name, False))
    return wanted


def _transformers_major() -> int:
    return int(str(package_version("transformers")).partition(".")[0])
