"""Everything of this folder that is about `torch.compiler`'s portable cache."""
