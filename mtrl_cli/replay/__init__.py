"""Replay buffers and rollout buffers."""
