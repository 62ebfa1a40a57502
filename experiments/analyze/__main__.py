"""Analyses a sweep, or what routers chose: ``python -m experiments.analyze DIR`` or ``routing --source=RUN``"""

from experiments import exits
from experiments.analyze.command import main

if __name__ == "__main__":
    exits.leave("experiments.analyze", main)
