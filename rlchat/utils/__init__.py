"""Small helpers that know nothing of chat models."""
