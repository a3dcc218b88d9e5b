"""The hypernetwork: configuration, attention and rotary positions, forward, checkpoints."""
