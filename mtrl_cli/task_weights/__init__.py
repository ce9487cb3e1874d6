"""How the losses of tasks become one gradient."""
