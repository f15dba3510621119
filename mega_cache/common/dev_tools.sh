# Sourced by test.sh after env.sh: makes sure that PYTHON has what dev_requirements.txt names.
# What is missing goes into one folder of the repository beside any environment, so that a user's
# own installation stays as it is and torch is not installed a second time.

if ! has_packages "$PYTHON" pytest xdist hypothesis ruff cryptography; then
  tools_dir=$repo_dir/.venv-dev/$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  if [[ ! -f $tools_dir/.complete ]]; then
    echo "first use: installing dev_requirements.txt into $tools_dir" >&2
    "$PYTHON" -m pip install -q --disable-pip-version-check --target "$tools_dir" \
      -r "$common_dir/dev_requirements.txt" >&2 && touch "$tools_dir/.complete"
  fi
  export PYTHONPATH="$tools_dir${PYTHONPATH:+:$PYTHONPATH}"
fi
