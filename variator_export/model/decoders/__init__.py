"""What a model that generates text has besides its encoder."""
