#!/usr/bin/env bash
# Build, run, benchmark and compare on a small model, on any machine, in a few minutes: first the
# package with a KV cache, then the base graph as it was published.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/common/env.sh"

# packages of its own, so that a real one built before is not replaced
kv=(--model-id random:tiny --package-path "$here/artifacts/demo_kv_cache.pt2")
base=(--model-id random:tiny --package-path "$here/artifacts/demo_base.pt2")
small=(--max-new-tokens 16)
step() { printf '\n== %s\n' "$*" >&2; }

step "build with a KV cache: export, compile, verify, save"
"$here/build.sh" "${kv[@]}" --kv-cache --no-max-autotune
step "run it: no compiler in the process"
"$here/run.sh" "${kv[@]}" "${small[@]}"
step "build and run the base graph"
"$here/build.sh" "${base[@]}" --no-max-autotune
"$here/run.sh" "${base[@]}" "${small[@]}"
step "benchmark the KV cache: 5 requests in each mode"
"$here/benchmark.sh" "${kv[@]}" "${small[@]}" --num-requests 5 --repeats 1 \
  --modes compile_preload,compile_no_preload,eager,floor
step "compare the base graph: load against skip, fresh processes with empty compiler caches"
"$here/compare.sh" "${base[@]}" "${small[@]}" --compare-runs 1
step "compare the KV cache"
"$here/compare.sh" "${kv[@]}" "${small[@]}" --compare-runs 1 "$@"
