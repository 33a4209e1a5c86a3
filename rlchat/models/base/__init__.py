"""Base models as the start of training, and as what an adapter belongs to."""
