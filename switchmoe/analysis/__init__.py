"""What came out: figures, reports, scaling fits and verdicts, from the directories that runs and sweeps left.

Reads `metrics.jsonl`, `run.json` and `config.json`, never a model (but for `routing.tracing`, which asks one whom it chose, and `playground`, which asks layers alone); writes HTML, Markdown, PNG and CSV. To add a figure:
a function of records in `plots`, and a place in `report`. Nothing below imports from here.
"""
