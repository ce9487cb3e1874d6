"""Task weightings: combine the losses of all tasks into one gradient."""
