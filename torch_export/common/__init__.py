"""What both folders need. The original is `mega_cache/common`, the twin `torch_export/common`."""
