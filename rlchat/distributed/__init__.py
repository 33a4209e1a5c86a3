"""Several processes: collectives, strategies, atomic checkpoints."""
