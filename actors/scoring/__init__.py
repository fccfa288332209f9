"""Serve deployments that score blocks: reference log-probs of pairs, rewards of completions.

No formats of files and no reward logic here: those are in sampo_ray.run and sampo_ray.data, from which this imports.
"""
