"""The network: a LLaVA of about six million parameters, and first values that let it learn to look."""

import torch
from torch import nn
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from ...configuration_frontend import FrontendLlavaConfig, base_type_of
from ...modeling_frontend import base_class_of
from .front_ends import FRONT_ENDS
from .world import GRID

EMBEDDING_STD = 0.25


def base_config(
    processor: LlavaProcessor, hidden_size: int = 256, num_layers: int = 10, front_end: str = "stock"
) -> LlavaConfig:
    """Sizes of the base. The features of the last vision layer are used: no layer is computed in vain."""
    tokenizer, front = processor.tokenizer, FRONT_ENDS[front_end]()
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=max(1, hidden_size // 128),
        head_dim=64,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    content = {
        "vision_config": front.vision.to_dict(),
        "text_config": text.to_dict(),
        "image_token_index": processor.image_token_id,
        "image_seq_length": GRID**2,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": front.feature_strategy,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }
    whole = FrontendLlavaConfig(**content, projector_type=front.projector_type)
    return whole if base_type_of(whole.to_dict()) == whole.model_type else LlavaConfig(**content)


def build_base(processor: LlavaProcessor, seed: int = 0, **sizes) -> LlavaForConditionalGeneration:
    """A new base in float32 with first values from the seed; `sizes` are those of `base_config`."""
    torch.manual_seed(seed)
    config = base_config(processor, **sizes)
    model = base_class_of(config.to_dict())(config)
    ease_lookups(model)
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.generation_config.bos_token_id = processor.tokenizer.bos_token_id
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    return model


@torch.no_grad()
def ease_lookups(model: LlavaForConditionalGeneration) -> None:
    """First values under which equal contents attend to each other and are named by their own words.

    A question finds its cell by matching words, and nothing is learned before a first match happens by chance. So keys
    start equal to queries, word vectors start large beside what the layers add, and the head starts as word vectors.
    """
    embeddings = model.get_input_embeddings().weight
    nn.init.normal_(embeddings, std=EMBEDDING_STD)
    model.get_output_embeddings().weight.copy_(0.1 * embeddings / EMBEDDING_STD)
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        queries = attention.q_proj.weight.view(
            -1, attention.num_key_value_groups, attention.head_dim, embeddings.shape[1]
        )
        attention.k_proj.weight.copy_(queries[:, 0].reshape_as(attention.k_proj.weight))
