"""What is trained here, in the formats of other programs, and on the hub."""
