"""From files of people to tokens: sources, preferences, the prompt format, rewards. No Ray."""
