"""Statistics over runs and tasks: bootstrap intervals, scores, transfer. Numpy only."""
