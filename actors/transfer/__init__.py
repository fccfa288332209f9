"""How the bytes of a version reach the replicas."""
