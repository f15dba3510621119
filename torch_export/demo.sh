#!/usr/bin/env bash
# Build, run, compare and benchmark on a small model, on any machine, in a few minutes.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/common/env.sh"

# its own artifact, so that a real one built before is not replaced
artifact=(
  --model-id random:tiny
  --package-path "$here/artifacts/demo_aotinductor.pt2"
)
step() { printf '\n== %s\n' "$*" >&2; }

step "build: export, compile ahead of time, verify against eager, save"
# without autotuning, which takes minutes on two cores and gains this model nothing
"$here/build.sh" "${artifact[@]}" --no-max-autotune
step "run: load it and generate"
"$here/run.sh" "${artifact[@]}" --max-new-tokens 16
step "benchmark: 5 requests in each mode"
"$here/benchmark.sh" "${artifact[@]}" --max-new-tokens 16 --num-requests 5 --repeats 1
step "compare: load against skip, fresh processes with empty compiler caches"
"$here/compare.sh" "${artifact[@]}" --max-new-tokens 16 --compare-runs 1 "$@"
