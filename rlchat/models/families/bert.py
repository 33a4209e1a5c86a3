"""BERT (Devlin et al. 2019)."""

from rlchat.models.families import EncoderFamily

FAMILIES = (EncoderFamily("bert"),)
