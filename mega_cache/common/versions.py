"""Every difference between the supported stacks, named, in one place.

Reference: torch 2.9.1 + transformers 4.57.5. Also: torch 2.11 + transformers 5.17, and torch 2.13 +
the newest transformers 5. A branch is chosen by what a library offers, not by its version number,
wherever the library lets us ask.
"""

import importlib.metadata


def package_version(name: str) -> str | None:
    """Return an installed package's version without importing it, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
