"""Encoders: what makes a Condition from images and an instruction."""
