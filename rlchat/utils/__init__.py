"""Small helpers that are independent of chat models."""
