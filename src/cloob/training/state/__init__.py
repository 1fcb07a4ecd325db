"""What a run leaves behind and goes on from."""
