"""What every request passes: keys, limits, headers."""
