"""Pages and answers about a bundle and a machine."""
