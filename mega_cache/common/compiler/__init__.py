"""Where a compiler runs: what it needs, and what it really did."""
