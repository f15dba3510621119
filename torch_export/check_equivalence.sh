#!/usr/bin/env bash
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")") # also through a link
. "$here/common/env.sh"
exec "$PYTHON" "$here/check_equivalence.py" "$@"
