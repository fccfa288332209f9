"""The live policy as an OpenAI-compatible endpoint: start it, ask for its address, stop it."""
