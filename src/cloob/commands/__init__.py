"""One module a sub-command: its arguments as a dataclass, and what it does."""
