"""Experts on disk: which of them stay in memory (`cache`), and which a layer will need next (`predict`)."""
