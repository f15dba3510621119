"""An artifact on disk: its metadata, its trust, and a store of them."""
