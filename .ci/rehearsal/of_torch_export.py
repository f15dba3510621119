"""What is checked of torch_export's packages."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from package_code import GraphCode, read_package, wide_instructions
from rehearsal import Ended, Rehearsal

BUILD = "torch_export/build_llama_aotinductor.py"
RUN = "torch_export/run_llama_aotinductor.py"
CHECK_LOGITS = "torch_export/check_equivalence.py"
DECODE = ("decode_layer", "head")
SLOTS = 2048
NEW_TOKENS, REQUESTS = 8, 2


@dataclass(frozen=True)
class Package:
    """A package to build and to start from."""

    name: str
    build: tuple[str, ...]
    run: tuple[str, ...] = (f"--max-new-tokens={NEW_TOKENS}",)
    model: str = "random:tiny"
    layers: int = 4  # of the base graph; a program of a KV cache holds one
    table_elements: int = SLOTS * 2 * 32  # one layer's K or V: slots, KV heads, head dim
    megabytes: float = 2.0  # at most, whatever the depth


BASE = Package("base", ("--no-max-autotune",))
STATIC = Package("static", ("--no-dynamic-seq-len", "--no-max-autotune"), ("--max-new-tokens=1",))
KV = Package("KV cache", ("--kv-cache", "--no-max-autotune"))


def of_qwen3(model: str) -> Package:
    """With norms of each head; its weights in the package."""
    build = ("--kv-cache", "--embed-weights", "--no-max-autotune")
    return Package("KV cache, embedded, Qwen3", build, model=model)


def of_3b(model: str, layers: int) -> Package:
    return Package(
        f"KV cache, {layers} layers of the 3B",
        ("--kv-cache", "--max-autotune"),
        model=model,
        layers=layers,
        table_elements=SLOTS * 8 * 128,
    )


def rehearse_package(rehearsal: Rehearsal, package: Package) -> None:
    """Build it, read its code, start from it in a fresh process."""
    subject = f"torch_export, {package.name}"
    path = rehearsal.folder / f"{package.name.replace(' ', '_')}.pt2"
    files = (f"--model-id={package.model}", f"--package-path={path}")
    built = rehearsal.run(BUILD, *files, *package.build)
    rehearsal.check_build(subject, built)
    if "--kv-cache" in package.build:
        replays = len(built.named("replayed"))
        rehearsal.check_that(subject, "a build replays what it captured", replays > 0, replays)
    metadata = json.loads(path.with_name(f"{path.stem}_meta.json").read_bytes())
    check_code(rehearsal, subject, package, path, metadata)
    prompt = ("--prompt-length=77", "--ignore-eos", f"--num-requests={REQUESTS}")
    if package is STATIC:
        prompt = ("--prompt-length=128", f"--num-requests={REQUESTS}")
    started = rehearsal.run(RUN, *files, *package.run, *prompt)
    check_start(rehearsal, subject, package, started)
    if package is KV:
        rehearsal.check_compare("torch_export, compare", RUN, *files, *package.run)
    if rehearsal.real and package is not STATIC:
        rehearsal.check_logits(subject, CHECK_LOGITS, files)


def check_code(
    rehearsal: Rehearsal, subject: str, package: Package, path: Path, metadata: dict
) -> None:
    architecture = "sm_" + metadata["environment"]["compute_capability"].replace(".", "")
    graphs = read_package(path)
    for name, graph in graphs.items():
        other = [t for t in graph.cubin_targets.elements() if t.rstrip("a") != architecture]
        rehearsal.check(f"{subject}, {name}", f"cubins are for {architecture}", other)
        wide = wide_instructions(graph.host_library)
        rehearsal.check(f"{subject}, {name}", "host code starts on any x86-64-v3", wide)
        CHECKS_OF_GRAPH.get(name, check_base)(rehearsal, f"{subject}, {name}", package, graph)
    if "--kv-cache" in package.build:
        missing = [name for name in CHECKS_OF_GRAPH if name not in graphs]
        rehearsal.check(subject, "a package holds four programs", missing)
        kernels = {kernel for name in DECODE for kernel in graphs[name].kernels}
        claim = f"at most 14 different kernels in decode ({len(kernels)})"
        rehearsal.check(subject, claim, kernels if len(kernels) > 14 else [])
    if "--embed-weights" not in package.build and "--kv-cache" in package.build:
        # without what only a rehearsal keeps
        sources = sum(len(graph.source) for graph in graphs.values())
        megabytes = (path.stat().st_size - sources) / 1e6
        claim = f"a package of code only has at most {package.megabytes:.0f} MB"
        rehearsal.check_that(subject, claim, megabytes <= package.megabytes, f"{megabytes:.1f} MB")


def check_base(rehearsal: Rehearsal, subject: str, package: Package, graph: GraphCode) -> None:
    # a mask goes with every prompt, and flash attention takes none
    check_attention(rehearsal, subject, package.layers, graph, "efficient")


def check_prefill_layer(
    rehearsal: Rehearsal, subject: str, package: Package, graph: GraphCode
) -> None:
    check_attention(rehearsal, subject, 1, graph, "flash")
    check_no_copy(rehearsal, subject, package, graph)


def check_decode(
    most: int, rehearsal: Rehearsal, subject: str, package: Package, graph: GraphCode
) -> None:
    """Check a program of which every launch counts; `most`: so many of them."""
    claim = f"at most {most} launches ({graph.launches})"
    too_many = graph.kernels if graph.launches > most else {}
    rehearsal.check(subject, claim, [name for name in too_many for _ in range(too_many[name])])
    rehearsal.check(subject, "no library call", graph.library_calls.elements())
    check_no_copy(rehearsal, subject, package, graph)


CHECKS_OF_GRAPH: dict[str, Callable] = {
    "prefill_layer": check_prefill_layer,
    "decode_layer": partial(check_decode, 6),
    "head": partial(check_decode, 4),
}


def check_attention(
    rehearsal: Rehearsal, subject: str, layers: int, graph: GraphCode, backend: str
) -> None:
    found = dict(graph.attention_backends)
    claim = f"{backend} attention in every layer"
    rehearsal.check_that(subject, claim, found == {backend: layers}, found)


def check_no_copy(rehearsal: Rehearsal, subject: str, package: Package, graph: GraphCode) -> None:
    copies = graph.buffers_of_at_least(package.table_elements)
    rehearsal.check(subject, "the caches are written in place", copies)


def check_start(rehearsal: Rehearsal, subject: str, package: Package, started: Ended) -> None:
    rehearsal.check(subject, "a quiet start says nothing", started.stderr)
    compiled = [*started.named("compiled"), *started.named("tuned"), *started.compilers_called()]
    rehearsal.check(subject, "a start compiles and tunes nothing", compiled)
    if "--kv-cache" in package.build:
        replays, steps = len(started.named("replayed")), REQUESTS * (NEW_TOKENS - 1)
        claim = f"each of {steps} decode steps replays a CUDA graph"
        rehearsal.check_that(subject, claim, replays >= steps, f"{replays} replays")
