"""Synthetic tasks, the pretraining of the bundled editor, the experiment on contradictory tasks."""
