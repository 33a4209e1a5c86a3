"""Checks of a PPO run: invariants, which hold in every correct run, and statistics of sampling."""
