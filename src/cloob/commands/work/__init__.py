"""What the commands do once their words are known to be right: torch and everything that is slow to import is here."""
