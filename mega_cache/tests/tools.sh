# Sourced by test.sh after env.sh: makes sure that PYTHON has what requirements.txt beside it names,
# then lints and checks the types of the folder `here`.
# What is missing goes into one folder of the repository beside any environment, so that a user's
# own installation stays as it is and torch is not installed a second time.

if ! has_packages "$PYTHON" pytest xdist hypothesis ruff pyrefly; then
  tools_dir=$repo_dir/.venv-dev/$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  if [[ ! -f $tools_dir/.complete ]]; then
    echo "first use: installing the tests' requirements.txt into $tools_dir" >&2
    "$PYTHON" -m pip install -q --disable-pip-version-check --target "$tools_dir" \
      -r "$here/tests/requirements.txt" >&2 && touch "$tools_dir/.complete"
  fi
  export PYTHONPATH="$tools_dir${PYTHONPATH:+:$PYTHONPATH}"
  export PATH="$tools_dir/bin:$PATH" # where pyrefly looks for its program last
fi

# On the stack that is pinned: what another torch says of its types is no reason for a red run. A
# folder copied alone has no settings to lint by.
pinned=$(sed -n 's/^torch==//p' "$repo_dir/requirements.txt" 2>/dev/null || true)
installed=$("$PYTHON" -c 'from importlib.metadata import version; print(version("torch"))')
if [[ -f $repo_dir/.ruff.toml && ${installed%%+*} == "$pinned" ]]; then
  "$PYTHON" -m ruff check "$here"
  "$PYTHON" -m ruff format --check "$here"
  modules=$(find "$here" -name '*.py' -not -path '*/tests/*' -not -path '*/artifacts/*')
  # shellcheck disable=SC2086 (a word for each module)
  "$PYTHON" -m pyrefly check -c "$repo_dir/.pyrefly.toml" --python-interpreter-path "$PYTHON" \
    --search-path "$here" --output-format min-text --summary=none $modules
fi
