"""Runs as jobs on an existing Ray cluster."""
