"""One module per step of `hywu eval`: configure(parser) and run(args) -> int."""
