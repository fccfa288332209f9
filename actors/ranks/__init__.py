"""Training ranks under Ray Train."""
