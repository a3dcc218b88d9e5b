"""Training: end to end through a frozen base model, the baselines, the conflict experiment."""
