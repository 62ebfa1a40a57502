"""What a step will need, before a device is paid for: memory, communication, FLOPs, time.

All of it follows from the settings and the layout's rules, with nothing allocated; `aot` compiles the real step for
virtual devices, against which the estimates are tested (tests/planning/test_planning.py). `planner.DEVICES` are the chips
that are known; to add one is an entry there, with its source.
"""
