"""Building verified bundles from recipes, and building engines for existing bundles."""
