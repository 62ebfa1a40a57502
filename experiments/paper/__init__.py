"""Tries the papers' claims and writes the scorecard."""
