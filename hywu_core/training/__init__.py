"""Training through a frozen base model: one loop, the strategies, the data; it knows no experiment."""
