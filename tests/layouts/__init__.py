"""Layouts of public preference and prompt data, in rows of our own, and what must be read from them."""
