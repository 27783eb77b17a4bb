"""How far a graph or an engine may be from its reference, and whether it is within that limit."""
