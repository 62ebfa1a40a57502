"""What routers chose, token by token: traces of it, what they say with what certainty, and a page to look at them.

A trace is a directory (`traces`: the schema, writing and reading). `tracing` writes one from a model and a text, `arrays`
from expert indices that another system gives. All else reads traces: `estimates` has intervals and shuffled baselines,
`loads`, `specialisation`, `chains` and `changes` the statistics, `summary` all of them, `pictures` and `page` show them.
"""
