"""mtrl: train one Q-network on many tasks, and measure what sharing the network costs and gains."""

__version__ = "0.1.0"
