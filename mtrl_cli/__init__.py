"""mtrl: one Q-network learns a pack of games, and its user learns what sharing it cost and gained."""

__version__ = "0.1.0"
