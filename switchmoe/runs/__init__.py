"""A run: parts (data, objective, judges, start) and the loop that carries them from the first step to the report.

`loop` compiles, steps, evaluates and saves; `rundir`, `checkpoints`, `buckets` and `lock` keep a run's directory whole
through faults and restarts; `resuming` says what may change in between; `signals` and `skipping` are what may come in
its way; `reporting` and `origin` are what it tells. The same call on the same directory goes on where it stopped and
gives what the run would have given undisturbed.

Nothing here draws or prints: a run writes records (`metrics.jsonl`, `run.json`), and lines to a `Progress`.
"""
