"""`rlchat look`: a page over the rollouts and metrics of a PPO run."""
