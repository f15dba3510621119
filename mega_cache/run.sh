#!/usr/bin/env bash
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/common/env.sh"
exec "$PYTHON" "$here/run_llama_with_portable_cache.py" "$@"
