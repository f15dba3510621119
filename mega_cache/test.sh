#!/usr/bin/env bash
# Lint and test this folder. pytest and the rest are put beside the environment, not into it.
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")") # also through a link
. "$here/common/env.sh"
. "$here/tests/tools.sh"
# two workers, a test file to each: most of the time goes to compilers that use one core. More OpenMP
# threads than cores would spin at each other's barriers, so each process gets one.
export OMP_NUM_THREADS=1
exec "$PYTHON" -m pytest -q -n 2 --dist loadfile "$here/tests" "$@"
