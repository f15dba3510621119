#!/usr/bin/env bash
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/common/env.sh"
exec "$PYTHON" "$here/benchmark_llama_modes.py" "$@"
