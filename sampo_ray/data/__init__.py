"""Data on its way to training: sources, rows, the prompt format, token blocks, rewards. No Ray, no run directories."""
