"""What is checked of mega_cache's artifacts."""

from dataclasses import dataclass

from package_code import host_libraries, wide_instructions
from rehearsal import Ended, Rehearsal

BUILD = "mega_cache/build_llama_portable_cache.py"
RUN = "mega_cache/run_llama_with_portable_cache.py"
CHECK_LOGITS = "mega_cache/check_equivalence.py"
NEW_TOKENS, REQUESTS = 8, 3


@dataclass(frozen=True)
class Artifact:
    """An artifact to build and to start from."""

    mode: str
    precompile: bool
    model: str = "random:tiny"
    # two caches, of 64 + 16 slots and of 512; the prompts need the one and the other
    longest: int = 512  # slots; 0: no second cache
    prompt_lengths: tuple[int, ...] = (1, 300)

    @property
    def name(self) -> str:
        model = "" if self.model == "random:tiny" else ", layers of the 3B"
        return f"{self.mode}{', precompiled' if self.precompile else ''}{model}"


def rehearse_artifact(rehearsal: Rehearsal, artifact: Artifact) -> None:
    """Build it, then start from it in fresh processes with empty compiler caches."""
    subject = f"mega_cache, {artifact.name}"
    path = rehearsal.folder / f"{artifact.name.replace(' ', '_')}.bin"
    files = (f"--model-id={artifact.model}", f"--cache-path={path}")
    precompile = "--precompile" if artifact.precompile else "--no-precompile"
    mode = f"--compile-mode={artifact.mode}"
    # its own verification costs as much as the starts below: rehearsed with precompiled steps only
    verify = "--verify" if artifact.precompile else "--no-verify"
    lengths = ("--prefill-lengths=64", "--decode-length=16", f"--max-cache-len={artifact.longest}")
    new_tokens = f"--max-new-tokens={NEW_TOKENS}"
    built = rehearsal.run(BUILD, *files, *lengths, mode, precompile, verify)
    rehearsal.check_build(subject, built)
    if artifact.precompile:
        libraries = host_libraries(path.read_bytes())
        wide = [one for library in libraries for one in wide_instructions(library)]
        claim = "the decode step's host code starts on any x86-64-v3"
        rehearsal.check(subject, claim, wide if libraries else ["no library found"])
    for length in artifact.prompt_lengths:
        started = rehearsal.run(
            RUN, *files, "--load-artifacts", "--require-hit", precompile,
            f"--prompt-length={length}", new_tokens, f"--num-requests={REQUESTS}", "--ignore-eos",
        )  # fmt: skip
        check_start(rehearsal, f"{subject}, prompt of {length}", artifact, started)
    if artifact == Artifact("default", True):
        rehearsal.check_compare("mega_cache, compare", RUN, *files, new_tokens)
    if rehearsal.real:
        rehearsal.check_logits(subject, CHECK_LOGITS, files)


def check_start(rehearsal: Rehearsal, subject: str, artifact: Artifact, started: Ended) -> None:
    counts = started.document["compile"]
    misses = [
        f"{count} {name}"
        for name, count in counts.items()
        # not async_compile_miss, which counts kernels that come ready-made from the artifact too
        if name.endswith(("cache_miss", "cache_bypass", "recompiles")) and count
    ]
    rehearsal.check(subject, "every graph hits", misses)
    rehearsal.check(subject, "no kernel is compiled", started.named("compiled"))
    rehearsal.check(subject, "no kernel is tuned", started.named("tuned"))
    rehearsal.check(subject, "no compiler and no worker is started", started.compilers_called())
    rehearsal.check(subject, "a quiet start says nothing", started.stderr)
    if artifact.mode in ("max-autotune", "reduce-overhead"):
        replays = len(started.named("replayed"))
        # Inductor runs a graph once as it is and records it once before it replays it
        least = REQUESTS * (NEW_TOKENS - 1) - 3
        claim = f"decode replays a CUDA graph ({replays} times, at least {least})"
        rehearsal.check_that(subject, claim, replays >= least, f"{replays} replays")
