"""The configuration of a run: its schema by section, recipes and profiles.

Imports `sampo_ray.errors` alone, and neither torch nor Ray. It opens no model and no file of a run.
"""
