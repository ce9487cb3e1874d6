"""mtrl: train one Q-network on many tasks, and compare it with independent networks."""

__version__ = "0.1.0"
