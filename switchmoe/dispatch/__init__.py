"""Back ends: tokens into the experts' buffers by a `Routing`, and out of them again, weighted by the gates.

A dispatcher is made from a `Routing` and has two methods: ``dispatch`` takes the tokens ``x_GSD`` of G groups into the
experts' buffers ``[E, G, C, D]`` of C slots (or rows sorted by expert, where there is no capacity), and ``combine`` takes
what the experts made of them back to ``y_GSD``. What has no slot is zero there. All of them give the output and the
gradients of a plain loop over experts; they differ in time and memory alone.

`dispatchers` has them for one device, `grouped` the product of sorted rows with their experts' kernels, `exchange` the
way over a mesh. None knows how the choices were made, and none knows Flax. To add one: an entry of
`dispatchers.DISPATCHERS`; tests/dispatch/test_dispatch.py runs it against the loop.
"""
