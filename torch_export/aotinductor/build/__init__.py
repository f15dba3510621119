"""What a build runs: export, compilation, packaging and verification. Needs torch and a compiler."""
