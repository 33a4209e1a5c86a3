"""The demo with a real chat model: PPO teaches SmolLM2-135M-Instruct to reply in one short sentence."""
