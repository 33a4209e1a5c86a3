"""ELECTRA (Clark et al. 2020); its embeddings may be narrower than its hidden states."""

from rlchat.models.families import EncoderFamily

FAMILIES = (EncoderFamily("electra"),)
