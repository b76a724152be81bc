"""Tiny text encoders with random weights, for the tokens of `latent.tokenizer`."""

from latent import VOCABULARY, seeded
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)


def clip(width: int, projection: int | None = None, seed: int = 0) -> CLIPTextModel | CLIPTextModelWithProjection:
    """projection: width of the pooled embedding; None: the class without it."""
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=projection or width,
        bos_token_id=1,
        eos_token_id=3,
    )
    return seeded(lambda: (CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config), seed)


def t5(width: int, seed: int = 0) -> T5EncoderModel:
    config = T5Config(vocab_size=VOCABULARY, d_model=width, d_kv=4, d_ff=2 * width, num_layers=1, num_heads=2)
    return seeded(lambda: T5EncoderModel(config), seed)


def bert(width: int, seed: int = 0) -> BertModel:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return seeded(lambda: BertModel(config), seed)
