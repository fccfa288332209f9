"""Training ranks under Ray Train; how a step is computed belongs to sampo_ray/training."""
