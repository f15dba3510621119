#!/usr/bin/env bash
# The whole of it on a small model, on any machine, in a minute or two.
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")") # also through a link
. "$here/common/env.sh"

# its own artifact, so that a real one built before is not replaced
artifact=(--model-id random:tiny --cache-path "$here/artifacts/demo_cache.bin")
step() { printf '\n== %s\n' "$*" >&2; }

step "build: warm up once, save what was compiled, see that it hits in a fresh process"
"$here/build.sh" "${artifact[@]}" --prefill-lengths 64 --decode-length 64 --max-cache-len 0
step "run: load it and generate"
"$here/run.sh" "${artifact[@]}" --max-new-tokens 64 --require-hit
step "benchmark: 10 requests in each mode, in fresh processes with empty compiler caches"
"$here/benchmark.sh" "${artifact[@]}" --max-new-tokens 64 --num-requests 10 --repeats 1 "$@"
echo "On a GPU, with a model a thousand times larger, compiling takes minutes where it takes seconds here." >&2
