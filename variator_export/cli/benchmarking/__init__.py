"""`variator-export bench`."""
