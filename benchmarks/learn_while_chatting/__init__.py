"""`rlchat learn` with simulated users of the demo's world: `python -m benchmarks.learn_while_chatting`."""
