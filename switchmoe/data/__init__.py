"""Data: documents, the vocabulary, and the batches that an objective makes of them.

`sources` finds documents (embedded, tensorflow-datasets, files) and splits off what is held out; `vocabulary` has pieces
for them; an objective (`objectives`) turns pieces into pairs of inputs and targets; `batches` packs them into int32
arrays ``inputs_BL`` and ``targets_BL``, the same ones for the same seed wherever and whenever a run goes on. Mistakes in
files are `errors.DataError`, one line.

Nothing here knows the model or the mesh. To add a source: `sources`; an objective: an entry of `objectives.OBJECTIVES`.
"""
