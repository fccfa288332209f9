"""Tiny random models of the families that transformers knows, and the trial of each against plain transformers."""
