"""Training: the state, the objective, and the step that lowers it.

`train_state` has parameters, optimizer state and step, as shapes, as arrays and with their places on a mesh;
`objective` says what is minimised; `train_step` takes gradients over microbatches and updates. Everything is summed over
tokens first and divided by the totals of the whole batch, so that padding changes no loss and no metric of given choices
(a capacity is of the padded length), nor do microbatches that hold whole groups.

Nothing here reads files or knows about runs. To add an optimizer: `optimizers`; an objective: an `objective.Objective`.
"""
