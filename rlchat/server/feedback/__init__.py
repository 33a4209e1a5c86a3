"""`/feedback`, `/learning` and `/reward`.

Verdicts on responses, what the model learns from them while it is in use, and the reward of its versions.
"""
