"""The multi-task network: torsos, sharing structures, heads."""
