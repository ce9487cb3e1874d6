"""What is done to a batch's observations before the learner sees them."""
