"""`/feedback` and `/learning`: verdicts on responses, and what the model learns from them while it is in use."""
