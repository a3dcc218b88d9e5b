"""`hywu`: the command line. One file a command; nobody else parses arguments."""

from .main import COMMANDS, main

__all__ = ["COMMANDS", "main"]
