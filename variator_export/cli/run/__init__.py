"""`variator-export run`."""
