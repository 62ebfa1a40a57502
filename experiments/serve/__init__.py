"""The parts of `experiments.serve`: see its `__main__`."""
