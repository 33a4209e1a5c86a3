"""Studies of RLHF on a small world whose truth is known: `rlchat study overoptimization`."""
