"""The benchmarks: what `python -m experiments.bench` measures, a file each, and what they share."""
