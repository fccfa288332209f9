"""Reference and reward workers."""
