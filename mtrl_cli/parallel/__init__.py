"""Training on several ranks with torchrun."""
