"""What the driver does in a run of training.

`fleet` starts actors and Serve applications, `rounds` takes a round through its `stages`, which `blocks` makes, and
prepares the next, `display` shows progress, `validate` checks a configuration first. Tensors and formats of files do
not belong here. The loop imports serve, actors and everything below; iterate.py, console and cluster import it.
"""
