"""Data on its way to training: the prompt format, token blocks, rewards. No Ray, no run directories."""
