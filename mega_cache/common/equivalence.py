"""Is a compiled start the same model? Equal tokens in float32, and how far the logits are off.

Tokens: `random:tiny` in float32 is built, then run eager and loaded, through the commands that a
user types; every token must be equal, nothing may be compiled again after the first request.

Logits: the given model, a few prompts, along one continuation (greedy by float32 eager): next-token
logits of each candidate minus those of float32 eager, absolute, mean and max over everything.
"""

import json
import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import flag, parse_flags, positive_int, positive_ints, to_argv
from common.console import Console
from common.errors import ScriptError
from common.flags import SharedFlags
from common.steps import run_bounded
from common.tables import markdown_table, number

if TYPE_CHECKING:
    import torch

    from common.checkpoints import Checkpoint

FOLDER = Path(__file__).resolve().parent.parent
TOKENS_MODEL, TOKENS_NEW, TOKENS_REQUESTS = "random:tiny", 64, 3
TIMEOUT_SECONDS = 1800.0

# (prompt's token ids, forced new token ids) -> (forced, vocab) next-token logits, float32, CPU
Engine = Callable[[list[int], list[int]], "torch.Tensor"]


@dataclass(frozen=True)
class EquivalenceFlags:
    """equivalence"""

    check_tokens: bool = flag(True, f"build {TOKENS_MODEL} in float32 and compare tokens")
    token_prompt_lengths: tuple[int, ...] = flag(
        (7, 129, 1000), "prompt lengths in tokens to compare tokens at", parse=positive_ints
    )
    token_build_flags: str = flag("", f"further flags of that {TOKENS_MODEL}'s build, in one word")
    check_logits: bool = flag(True, "compare the given model's logits with float32 eager")
    logit_prompt_lengths: tuple[int, ...] = flag(
        (16, 128, 512), "prompt lengths in tokens to compare logits at", parse=positive_ints
    )
    logit_steps: int = flag(8, "next-token logits per prompt", parse=positive_int)


@dataclass(frozen=True)
class Kind:
    """What differs between folders.

    `settings` are the run script's flags, with `shared` among them; `artifact_flags` name the
    artifact at a path's stem; `check_logits(settings, flags, console)` is compare_logits with the
    folder's own engine.
    """

    approach: str
    settings: type
    artifact_flags: Callable[[Path], list[str]]
    check_logits: Callable[[Any, EquivalenceFlags, Console], dict]


def main(kind: Kind, description: str, argv: Sequence[str]) -> None:
    """Check what the flags say, write and print it, and fail when tokens differ."""
    settings, flags = parse_flags(description, (kind.settings, EquivalenceFlags), argv)
    console = Console(settings.shared.quiet)
    from common.results import config_of, run_header, write_json
    from common.trials import private_compiler_caches

    tokens, logits = None, None
    if flags.check_tokens:
        tokens = compare_tokens(settings.shared, flags, kind.artifact_flags, console)
    if flags.check_logits:
        with private_compiler_caches():
            logits = kind.check_logits(settings, flags, console)
    header = run_header(kind.approach, "equivalence", config_of(settings, flags))
    document = header | {"kind": "equivalence", "tokens": tokens, "logits": logits}
    write_json(document, settings.shared.json)
    console.result(equivalence_table(document))
    check_tokens_equal(document)


def compare_tokens(
    shared: SharedFlags,
    checks: EquivalenceFlags,
    artifact_flags: Callable[[Path], list[str]],
    console: Console,
) -> list[dict]:
    """Return per prompt length whether eager and load gave the same tokens, and what compiled."""
    shared = replace(shared, model_id=TOKENS_MODEL, dtype="float32", json=None)
    with tempfile.TemporaryDirectory(prefix="llama-equivalence-") as folder:
        flags = [*to_argv(shared), *artifact_flags(Path(folder, "artifact"))]
        build_flags = shlex.split(checks.token_build_flags)
        _succeed("build.sh", [*flags, *build_flags], Path(folder, "build.json"))
        found = []
        for length in console.bar(checks.token_prompt_lengths, "tokens", "prompt"):
            request = [
                f"--prompt-length={length}",
                f"--max-new-tokens={TOKENS_NEW}",
                f"--num-requests={TOKENS_REQUESTS}",
                "--ignore-eos",
            ]
            modes = {"eager": ["--eager", "--no-load-artifacts"], "load": ["--load-artifacts"]}
            runs = {
                mode: _succeed("run.sh", [*flags, *request, *own], Path(folder, "run.json"))
                for mode, own in modes.items()
            }
            found.append(_same_tokens(length, runs["eager"], runs["load"]))
    return found


def _same_tokens(length: int, eager: dict, load: dict) -> dict:
    tokens = eager["output"]["token_ids"]
    identical = all(run["output"]["requests_identical"] for run in (eager, load))
    return {
        "prompt_length": length,
        "identical": identical and tokens == load["output"]["token_ids"],
        "new_tokens": len(tokens),
        "distinct_tokens": len(set(tokens)),
        "requests": TOKENS_REQUESTS,
        "recompiles": load["compile"].get("recompiles"),
        "cudagraph_skips": load["compile"].get("cudagraph_skips"),
    }


def _succeed(wrapper: str, flags: Sequence[str], result: Path) -> dict:
    """Run one of the folder's wrappers and return the result that it wrote."""
    result.unlink(missing_ok=True)
    command = [str(FOLDER / wrapper), *flags, "--quiet", f"--json={result}"]
    ended = run_bounded(command, TIMEOUT_SECONDS, show=False)
    if ended.error is not None:
        raise ScriptError(f"{wrapper}: {ended.error}")
    return json.loads(result.read_bytes())


def compare_logits(
    checkpoint: "Checkpoint",
    device: "torch.device",
    dtype: "torch.dtype",
    flags: EquivalenceFlags,
    make_engine: Callable[[], Engine | None],
    seed: int,
) -> dict:
    """Return the errors of eager bfloat16 and of the approach's own engine in `dtype`.

    One model is on the device at a time: the reference needs four bytes a weight.
    """
    import torch

    from common.prompts import load_codec

    codec = load_codec(checkpoint.folder)
    prompts = [codec.synthetic_prompt(length, seed) for length in flags.logit_prompt_lengths]
    engine = eager_engine(checkpoint, device, torch.float32)
    forced = [continue_greedily(engine, prompt, flags.logit_steps) for prompt in prompts]
    reference = _all_logits(engine, prompts, forced)
    del engine
    engine = eager_engine(checkpoint, device, torch.bfloat16)
    rows = [_errors("eager", "bfloat16", _all_logits(engine, prompts, forced), reference)]
    del engine
    engine = make_engine()
    if engine is not None:
        name = str(dtype).removeprefix("torch.")
        rows.append(_errors("load", name, _all_logits(engine, prompts, forced), reference))
    return {
        "reference": "eager float32",
        "reference_std": float(torch.cat(reference).std()),
        "prompt_lengths": list(flags.logit_prompt_lengths),
        "steps": flags.logit_steps,
        "rows": rows,
    }


def eager_engine(checkpoint: "Checkpoint", device: "torch.device", dtype: "torch.dtype") -> Engine:
    """Return the logits of the Hugging Face model in one pass over prompt and forced tokens."""
    import torch

    from common.models import load_model

    model = load_model(checkpoint, device, dtype)

    def logits(prompt: list[int], forced: list[int]) -> torch.Tensor:
        ids = torch.tensor([prompt + forced[:-1]], device=device)  # (1, prompt + forced - 1) int64
        found = model(ids, use_cache=False, logits_to_keep=len(forced)).logits
        return found[0].float().cpu()  # (forced, vocab)

    return logits


def continue_greedily(engine: Engine, prompt: list[int], steps: int) -> list[int]:
    """Return the most likely next `steps` token ids, one after another."""
    forced: list[int] = []
    for _ in range(steps):
        # the last entry is a place holder: the engine answers what follows everything before it
        forced.append(int(engine(prompt, [*forced, 0])[-1].argmax()))
    return forced


def _all_logits(
    engine: Engine, prompts: list[list[int]], forced: list[list[int]]
) -> list["torch.Tensor"]:
    return [engine(prompt, tokens) for prompt, tokens in zip(prompts, forced, strict=True)]


def _errors(
    mode: str, dtype: str, found: list["torch.Tensor"], reference: list["torch.Tensor"]
) -> dict:
    import torch

    difference = (torch.cat(found) - torch.cat(reference)).abs()
    best = [logits.argmax(-1) for logits in (torch.cat(found), torch.cat(reference))]
    return {
        "mode": mode,
        "dtype": dtype,
        "mean_abs_error": float(difference.mean()),
        "max_abs_error": float(difference.max()),
        "same_top_token_share": float((best[0] == best[1]).float().mean()),
    }


def equivalence_table(document: dict) -> str:
    """Return both parts as tables, those that were checked."""
    parts = []
    if tokens := document.get("tokens"):
        header = ["prompt tokens", "float32 tokens equal", "recompiles", "cudagraph_skips"]
        parts.append(
            markdown_table(
                header,
                [
                    [
                        str(row["prompt_length"]),
                        f"{'yes' if row['identical'] else 'NO'} ({row['new_tokens']})",
                        number(row["recompiles"]),
                        number(row["cudagraph_skips"]),
                    ]
                    for row in tokens
                ],
            )
        )
    if logits := document.get("logits"):
        header = ["logits against float32 eager", "mean abs error", "max abs error"]
        rows = [
            [
                f"{row['mode']}, {row['dtype']}",
                error_text(row["mean_abs_error"]),
                error_text(row["max_abs_error"]),
            ]
            for row in logits["rows"]
        ]
        parts.append(markdown_table(header, rows))
    return "\n\n".join(parts)


def error_text(error: float | None) -> str:
    return "-" if error is None else f"{error:.2g}"


def check_tokens_equal(document: dict) -> None:
    """Raise when eager and load disagree, or when something compiled after the first request."""
    for row in document.get("tokens") or ():
        if not row["identical"]:
            raise ScriptError(f"eager and load differ at a prompt of {row['prompt_length']} tokens")
        if row["recompiles"]:
            raise ScriptError(
                f"{row['recompiles']} recompiles at a prompt of {row['prompt_length']} tokens"
            )
