"""Reports about bundles and diagnosis of machines."""
