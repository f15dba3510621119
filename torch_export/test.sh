#!/usr/bin/env bash
# Lint and test this folder. pytest and the rest are put beside the environment, not into it.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/common/env.sh"
. "$here/common/dev_tools.sh"
if [[ -f $here/../.ruff.toml ]] && "$PYTHON" -m ruff --version >/dev/null 2>&1; then
  "$PYTHON" -m ruff check "$here"
  "$PYTHON" -m ruff format --check "$here"
fi
exec "$PYTHON" -m pytest -q "$here/tests" "$@"
