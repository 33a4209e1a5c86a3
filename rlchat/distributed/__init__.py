"""Training in several processes: collectives, strategies, atomic checkpoints."""
