"""The embedded corpus: summaries of 10,014 vital articles of the English Wikipedia (CC BY-SA 4.0)."""
