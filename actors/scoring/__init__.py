"""Serve deployments that score blocks. Formats of files and reward logic are in sampo_ray.run and sampo_ray.data."""
