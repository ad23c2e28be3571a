"""Where the two halves of a block end, by architecture: what an adapter is put behind."""

from __future__ import annotations

from typing import Literal

from hf_transfer.errors import ConfigurationError, nearest

Placement = Literal["houlsby", "pfeiffer"]

_BERT = (r"attention\.output\.dense", r"layer\.\d+\.output\.dense")
_LLAMA = (r"self_attn\.o_proj", r"mlp\.down_proj")
_BART = (r"(self_attn|encoder_attn)\.out_proj", r"layers\.\d+\.fc2")
_VIT = (r"attention\.o_proj", r"mlp\.fc2")

_LIKE_BERT = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta", "deberta-v2")
_LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "smollm3")

BLOCK_ENDS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(_LIKE_BERT, _BERT),
    **dict.fromkeys(_LIKE_LLAMA, _LLAMA),
    **dict.fromkeys(("bart", "mbart", "opt", "whisper", "marian"), _BART),
    **dict.fromkeys(("vit", "dinov2", "swin", "deit"), _VIT),
    "mpnet": (r"attention\.attn\.o", _BERT[1]),
    "clip": (r"self_attn\.out_proj", _VIT[1]),
    "distilbert": (r"attention\.out_lin", r"ffn\.lin2"),
    "modernbert": (r"attn\.Wo", r"mlp\.Wo"),
    "dinov3_vit": (r"attention\.o_proj", r"mlp\.down_proj"),
    "phi": (r"self_attn\.dense", r"mlp\.fc2"),
    "gpt2": (r"attn\.c_proj", r"mlp\.c_proj"),
    "t5": (r"(SelfAttention|EncDecAttention)\.o", r"DenseReluDense\.wo"),
    "wav2vec2": (r"attention\.out_proj", r"feed_forward\.output_dense"),
}
"""By ``config.model_type``: the last linear layer of the attention, and of the feed-forward half."""


def block_ends(model_type: str, placement: Placement) -> str:
    """A pattern of the modules that an adapter is put behind.

    Raises:
        ConfigurationError: The architecture is not in the table.
    """
    if model_type not in BLOCK_ENDS:
        raise ConfigurationError(
            f"BottleneckConfig: it is not known where the blocks of '{model_type}' end. Give target_modules: the last "
            f"linear layers of the attention and of the feed-forward half. {nearest(model_type, BLOCK_ENDS)}"
        )
    attention, feed_forward = BLOCK_ENDS[model_type]
    return rf".*\b({attention}|{feed_forward})" if placement == "houlsby" else rf".*\b({feed_forward})"
