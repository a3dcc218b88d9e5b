"""Training a generator through a graph's MODEL."""
