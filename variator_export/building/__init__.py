"""From a recipe to a verified bundle, and engines for one that is there."""
