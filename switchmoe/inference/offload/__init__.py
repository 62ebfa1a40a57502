"""Experts on disk (docs/offload.md).

`layout` and `store` are the files, `memory` is where experts lie at hand, `cache` says which stay, `predict` which a layer will need next,
`widths` how many bits each has. `runtime` brings them in, `shelf` is what a program's layers ask, `model` puts it together.
"""

WAYS = (
    "direct",
    "pread",
    "mmap",
)  # in which experts are read; here, as a command names them before it loads JAX
