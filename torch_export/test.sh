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
# two workers, a test file to each: most of the time goes to compilers that use one core. More OpenMP
# threads than cores would spin at each other's barriers, so each process gets one.
export OMP_NUM_THREADS=1
exec "$PYTHON" -m pytest -q -n 2 --dist loadfile "$here/tests" "$@"
