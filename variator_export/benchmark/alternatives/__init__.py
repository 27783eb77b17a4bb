"""What users run instead of this package: other exports, runtimes and quantisations of the backbone."""
