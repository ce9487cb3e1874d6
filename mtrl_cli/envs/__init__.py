"""Environment packs: K tasks with N environments each, stepped together."""
