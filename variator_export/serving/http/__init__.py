"""The server: OpenAI's and text-embeddings-inference's endpoints before a `Service`."""
