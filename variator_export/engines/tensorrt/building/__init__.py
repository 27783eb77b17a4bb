"""Building of engines, in a process of its own."""
