"""Generation of tokens by a decoder that is called once for each token. Needs neither torch nor a runtime."""
