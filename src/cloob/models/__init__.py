"""Two towers by name, and the folders they are stored in."""
