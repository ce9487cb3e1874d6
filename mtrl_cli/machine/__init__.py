"""Hardware: cores, memory, devices, CUDA graphs, random number generators."""
