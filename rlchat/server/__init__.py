"""The HTTP server: OpenAI-compatible API, batching engine, page."""
