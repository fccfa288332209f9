"""Data on its way to training: sources, the layouts of preference rows, the prompt format, token blocks, rewards.

    sources       files, folders, `datasets` and the hub as streams of records
    layouts       records as prompts and preference pairs; which rows are dropped, and why
    chat          the prompt format that trainer, rollouts and endpoint share
    preferences   blocks of token ids, and how scored completions become pairs
    rewards       reward functions and reward models

No Ray and no run directories here: streams, tables and functions only. Imports go to training, config and errors.
"""
