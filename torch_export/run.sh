#!/usr/bin/env bash
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")") # also through a link
needs=(numpy tokenizers) # a package brings the rest
. "$here/common/env.sh"
exec "$PYTHON" "$here/run_llama_aotinductor.py" "$@"
