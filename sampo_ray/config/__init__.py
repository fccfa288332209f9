"""What a run is configured with. Importable without torch; knows nothing of Ray, models or files of a run."""
