"""What the driver does in a run of training.

`fleet` and `serving` start actors and Serve applications, `rounds` takes a round through its `stages`, `ahead` prepares
the next one, `reporter` is how progress is reported and `display` shows it, `validate` checks a configuration first.
Tensors and formats of files do not belong here. The loop imports serve, actors and everything below; only iterate.py,
the console and cluster import it.
"""
