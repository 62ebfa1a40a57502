"""Sweeps: what their runs are (`study`), the loop that starts them (`command`), what came of them (`outcomes`)."""
