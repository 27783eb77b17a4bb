"""How fast a bundle is, against what a user would pick instead."""
