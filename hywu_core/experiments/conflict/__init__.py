"""Pieces of the experiment on contradictory tasks: controls, gradient cosines, statistics."""
