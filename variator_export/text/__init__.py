"""Text to token ids, and outputs to predictions. Needs neither torch nor transformers."""
