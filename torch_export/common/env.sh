# Sourced by the wrappers: sets PYTHON to an interpreter that has torch and transformers.
# Kept if the user set it; else the active python3; else the repository's .venv, made on first use.
# A wrapper that can do without torch names in the array `needs` what will do; nothing is installed
# for it.

# no `cd`: it says where it went if the user exports CDPATH
common_dir=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
repo_dir=$(dirname "$(dirname "$common_dir")")
unset PYTHONSAFEPATH # a script imports from its own folder

# looking for a package is a hundred times faster than importing it
has_packages() {
  local interpreter=$1
  shift
  "$interpreter" -c 'import importlib.util, sys
sys.exit(any(importlib.util.find_spec(name) is None for name in sys.argv[1:]))' "$@" 2>/dev/null
}

make_venv() {
  local venv=$repo_dir/.venv
  # a mark, written last: an interrupted install is taken up again instead of being used half
  if [[ ! -f $venv/.complete ]]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || {
      echo "error: no python3 of version 3.10 or newer on PATH: install one, or set PYTHON" >&2
      exit 5
    }
    echo "first use: installing $repo_dir/requirements.txt into $venv (about 7 GB)" >&2
    python3 -m venv "$venv" >&2
    "$venv/bin/python" -m pip install -q --disable-pip-version-check \
      -r "$repo_dir/requirements.txt" >&2
    touch "$venv/.complete"
  fi
  PYTHON=$venv/bin/python
}

if [[ -z ${PYTHON:-} ]]; then
  if has_packages python3 torch transformers; then
    PYTHON=python3
  elif [[ -f $repo_dir/.venv/.complete ]]; then
    PYTHON=$repo_dir/.venv/bin/python
  elif [[ -n ${needs:-} ]]; then
    has_packages python3 "${needs[@]}" || {
      echo "error: python3 has not all of ${needs[*]}: install what requirements-serve.txt names," \
        "or set PYTHON" >&2
      exit 5
    }
    PYTHON=python3
  elif [[ -f $repo_dir/requirements.txt ]]; then
    make_venv
  else
    echo "error: python3 has no torch and transformers: install them, or set PYTHON" >&2
    exit 5
  fi
fi
export PYTHON
