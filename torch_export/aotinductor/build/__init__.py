"""What a build runs: export, compile, package, verify. Needs torch and a compiler."""
