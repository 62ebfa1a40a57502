"""Checkpoints of other code bases in and out, and dense models made sparse. See docs/checkpoints.md."""
