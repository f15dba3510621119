"""What a start runs: from a package and a checkpoint to tokens, without torch and transformers."""
