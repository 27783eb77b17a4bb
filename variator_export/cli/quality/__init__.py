"""Commands on the quality of a bundle: `evaluate` and `report`."""
