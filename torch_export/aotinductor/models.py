"""Which models the graphs of this folder are made for; others are refused by name."""

from common.errors import UsageError
from common.model.checkpoint import Checkpoint

# attention, MLP and norms where Llama has them; biases, and norms of q and k, where a weight says
# so. Others differ in what no weight shows: scaled residuals, logits or queries, NoPE, experts.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def refuse_unsupported(checkpoint: Checkpoint, kv_cache: bool) -> None:
    """Raise UsageError if a graph of this folder would not be the checkpoint's model."""
    found, rope = checkpoint.architecture, checkpoint.resolved["rope"]
    if found["model_type"] not in FAMILIES:
        problem = (
            f"is a {found['model_type']} model, and the graphs are made for {', '.join(FAMILIES)}"
        )
    elif found["windows"]:
        window = found["windows"]["window"]
        problem = f"attends within a sliding window of {window} tokens, which the graphs do not"
    elif rope["depends_on_length"]:
        graph = "a graph with a KV cache" if kv_cache else "an exported graph"
        problem = (
            f"has rope type {rope['type']!r}, whose frequencies change with the length: {graph} "
            "cannot hold that"
        )
    elif 2 * len(rope["inv_freq"]) != found["head_dim"]:
        problem = (
            f"rotates {2 * len(rope['inv_freq'])} of the {found['head_dim']} numbers of a head, "
            "and the graphs rotate all"
        )
    else:
        return
    raise UsageError(f"{checkpoint.model_id} {problem}: run it with --eager, or use mega_cache")
