"""What both folders need. `mega_cache/common` is the original; `torch_export/common` is its twin."""
