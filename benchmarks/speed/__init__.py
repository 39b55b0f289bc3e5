"""Private against non-private training: time, memory, and what the machine would allow."""
