"""Multi-task networks: torsos, sharing structures, heads."""
