"""The steps of a build: graphs, their other forms, engines, quality."""
