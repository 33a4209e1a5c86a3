"""RoBERTa (Liu et al. 2019) and the families that share its position ids."""

from rlchat.models.families import EncoderFamily

FAMILIES = tuple(
    EncoderFamily(model_type, positions_follow_padding=True)
    for model_type in (
        "roberta",
        "camembert",
        "data2vec-text",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
    )
)
