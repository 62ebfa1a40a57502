"""Serving: many requests at once, which join and leave between the steps of one compiled program. No HTTP in here.

`programs` prepares parameters and runs the device: to serve from elsewhere (experts on disk, several devices), another
object with its methods. `engine` decides who is in which slot, `text` makes text of tokens as they come.
"""
