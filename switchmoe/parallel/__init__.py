"""Devices: the mesh, the layouts that say what lies where on it, and the processes of a job.

A layout is data: a table from logical axis names to the mesh's axes (`sharding.LAYOUTS`). `sharding` makes the mesh,
refuses what does not fit on it and gives arrays their places; `distributed` has the processes agree.

Nothing here knows the optimizer or the step. To add a layout: an entry of `LAYOUTS`; tests/parallel/test_layouts.py runs
each of them and compares its numbers with those of one device.
"""
