"""How far a package's logits are from the model's: before it is published, and for a user who asks.

What is compared is the logits of true tokens, so padding is verified as well. On a GPU every decode
step is a replay of the captured one, as in a run. `model` is transformers'.
"""

import copy
from typing import Any

import numpy as np
import torch

from aotinductor.flags import APPROACH, RunSettings
from aotinductor.lengths import Plan
from aotinductor.serving import open_run, with_fetched_package
from aotinductor.start.base_engine import BaseEngine
from aotinductor.start.kv_engine import KvEngine
from common.cli import Console, EquivalenceFlags
from common.errors import ScriptError
from common.measure.report import logit_errors, logits_document
from common.model.eager import eager_logits, load_model

# The largest difference of a logit from eager's, as a share of eager's largest logit. Seen on a
# CPU: 6e-6, 7e-3 and 4e-2 of random:tiny; 3e-6, 2e-3 and 2e-2 of a real model of 30 layers.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
# Beyond it eager may be as far off: 0.1 at random:1b's width in bfloat16. Then both are held
# against the same weights computed with in float32, and by chance a package is farther off (1.7
# times seen).
FARTHER_THAN_EAGER = 2.0


def verify_package(engine: KvEngine | BaseEngine, model, plan: Plan) -> list[dict[str, Any]]:
    """Return how far the logits are from eager's: at the lower bound, the upper, and in between.

    Those of all tokens of the base graph; with a KV cache those of prefill, and of one step of
    decode where there is a slot for it. Raises ScriptError beyond the tolerance, unless eager in
    16 bits is about as far from float32 as the package is.
    """
    base = isinstance(engine, BaseEngine)
    dtype = str(model.dtype).removeprefix("torch.")
    tolerance, exact_model = TOLERANCES[dtype], None
    low, high = plan.bounds.min_seq_len, plan.bounds.max_seq_len
    checks = []
    # the longest first: what it leaves in the cache must not reach the shorter ones
    for length in sorted({low, round((low * high) ** 0.5), high}, reverse=True):
        padded = plan.padded(length)
        rows = [("prefill", length, padded, 0), ("decode", length + 1, length + 1, 1)]
        if base:
            rows = [("base", length, padded, slice(None))]
        elif length == engine.cache.slots:
            rows.pop()
        chance, tokens = torch.Generator().manual_seed(length), rows[-1][1]
        ids = torch.randint(model.config.vocab_size, (tokens,), generator=chance).tolist()
        count = length if base else len(rows)
        found, expected = engine_logits(engine, plan, ids, count), eager_logits(model, ids, count)
        exact = None
        for graph, tokens, padded, row in rows:
            check = {"graph": graph, "tokens": tokens, "padded_tokens": padded}
            check |= describe_difference(found[row], expected[row])
            checks.append(check)
            if check["max_relative_difference"] <= tolerance:
                continue
            if dtype != "float32":
                if exact is None:  # a pass for all rows of the length
                    exact_model = exact_model or copy.deepcopy(model).float()
                    exact = eager_logits(exact_model, ids, count)
                both = {"package": found[row], "eager": expected[row]}
                check["float32"] = {
                    name: describe_difference(logits, exact[row])["max_relative_difference"]
                    for name, logits in both.items()
                }
            require_eagers_precision(check, tolerance)
    return checks


def require_eagers_precision(check: dict[str, Any], tolerance: float) -> None:
    """Raise ScriptError unless float32 shows that a difference beyond tolerance is eager's too."""
    text = (
        f"the package's logits are not the model's: at {check['tokens']} tokens they differ by "
        f"{check['max_relative_difference']:.2g} of the largest logit, at most {tolerance:g} was "
        "expected"
    )
    if off := check.get("float32"):
        if off["package"] <= FARTHER_THAN_EAGER * off["eager"]:  # written so that NaN fails
            return
        text += f" (from float32: {off['package']:.2g}, eager {off['eager']:.2g})"
    raise ScriptError(f"{text}; nothing was replaced")


def describe_difference(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Return the largest difference of two equal shapes of logits, and its share of the largest."""
    difference = (found - expected).abs().max().item()
    return {
        "max_absolute_difference": difference,
        "max_relative_difference": difference / expected.abs().max().item(),
    }


def engine_logits(
    engine: KvEngine | BaseEngine, plan: Plan, ids: list[int], count: int
) -> torch.Tensor:
    """As `eager_logits`, of a package; with a KV cache one by one, the first of them by prefill."""
    if isinstance(engine, BaseEngine):
        return torch.tensor(engine.logits(ids, count))
    prompt, forced = ids[: len(ids) - count + 1], ids[len(ids) - count + 1 :]
    engine.prefill(prompt, plan.padded(len(prompt)))
    rows = [engine.read_logits()]
    for token in forced:
        engine.force(token)  # instead of the package's own choice
        engine.decode()
        rows.append(engine.read_logits())
    return torch.from_numpy(np.stack(rows))


def compare_logits(settings: RunSettings, flags: EquivalenceFlags, console: Console) -> dict:
    """Return, for each prompt length, the errors of the logits of eager and of the package.

    Against those of the model in float32, along its own greedy continuation.
    """
    settings = with_fetched_package(settings, console)
    opening = open_run(settings, console)
    target, plan = opening.target, opening.plan
    steps, lengths = flags.logit_steps, flags.logit_prompt_lengths
    for length in lengths:
        plan.check_request(length, steps)
    engine = opening.load(console, warm_up_tokens=plan.padded(lengths[0])).generator
    reference, eager = load_model(target, "float32"), load_model(target)
    rows = []
    for length in console.bar(lengths, "logits", "prompt"):
        ids = opening.codec.synthetic_prompt(length, settings.shared.seed)
        for _ in range(steps - 1):
            ids.append(int(eager_logits(reference, ids, 1).argmax()))
        expected = eager_logits(reference, ids, steps)
        found = {
            "eager": eager_logits(eager, ids, steps),
            "load": engine_logits(engine, plan, ids, steps),
        }
        errors = {mode: logit_errors(found[mode], expected) for mode in found}
        rows.append({"prompt_length": length, **errors})
    return logits_document(APPROACH, target.dtype, plan.slots, steps, rows)
