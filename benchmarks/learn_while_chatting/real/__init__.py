"""Learning from a simulated user's verdicts on a real chat model, SmolLM2-135M-Instruct: a preference that shows."""
