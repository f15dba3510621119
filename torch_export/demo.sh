#!/usr/bin/env bash
# Build, run and measure a small model's package with a KV cache, on any machine, in a minute or two.
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")") # also through a link
. "$here/common/env.sh"

# a package of its own, so that a real one built before is not replaced; a cache that fits
package=(--model-id random:tiny --package-path "$here/artifacts/demo.pt2")
# within one block of slots: at the second one the runtime's compiler would compile decode again
short=(--prompt Hello --max-new-tokens 56)
step() { printf '\n== %s\n' "$*" >&2; }

step "build: export, compile, verify, save"
"$here/build.sh" "${package[@]}" --kv-cache --max-seq-len 256 --no-max-autotune
step "run: no compiler in the process"
"$here/run.sh" "${package[@]}" "${short[@]}"
step "benchmark: started from the package, compiled at runtime, and eager, in fresh processes"
"$here/benchmark.sh" "${package[@]}" "${short[@]}" --num-requests 10 --repeats 1 "$@"
step "on a GPU the package also holds its kernels, replays decode as one CUDA graph, and the wait" \
  "it saves is minutes: ./build.sh --kv-cache && ./run.sh"
