"""The live policy as an OpenAI-compatible endpoint."""
