"""Which model: the checkpoint, its tokenizer and weights, the device and the dtype."""
