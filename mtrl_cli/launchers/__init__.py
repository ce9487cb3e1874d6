"""Places where the trials of a sweep run: local processes, Slurm, Ray."""
