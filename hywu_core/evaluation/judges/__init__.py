"""Judges behind one small interface: an OpenAI-compatible endpoint, a local model, pixels."""
