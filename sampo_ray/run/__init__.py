"""What a run directory is: storage, manifest, versions, feedback, status. No actors."""
