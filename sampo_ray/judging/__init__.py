"""Judges: language models behind an endpoint that compare two answers, or rate one.

`judge` is what others use. `client` makes the calls, `presets` words them, `verdicts` reads the answers, `cache` keeps
them, `ranking` makes rewards of comparisons, and `tally` counts what it took. What is no verdict is counted and never
guessed.
"""
