"""Evaluation: what a version scores, under which conditions, how sure that is; and how runs are compared."""
