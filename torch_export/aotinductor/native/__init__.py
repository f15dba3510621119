"""The native libraries that a package carries: their sources, and how a build compiles them."""
