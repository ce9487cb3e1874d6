"""The training loop, the learner and evaluation."""
