"""Tiny random models of the decoder families of transformers, by their real classes."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any

import torch
import transformers
from torch import Tensor

from flexproxy.integrations.transformers import configure

VOCABULARY = 64
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 32
IMAGE, IMAGE_TOKENS = 5, 16

_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 4096,
    "initializer_range": 0.15,  # large, so that heads attend to something
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}

# Name of the class, and what its configuration has besides _BASE.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 100}),
    "qwen2": ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 1}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "phi3": ("Phi3ForCausalLM", {"hidden_size": HEADS * HEAD_DIM}),  # heads of hidden_size / heads
    "gemma2": ("Gemma2ForCausalLM", {"sliding_window": 100, "query_pre_attn_scalar": 50}),
    "gemma3": ("Gemma3ForCausalLM", {"sliding_window": 100, "layer_types": ["sliding_attention", "full_attention"]}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "granite": ("GraniteForCausalLM", {"attention_multiplier": 0.1, "embedding_multiplier": 2.0}),
    "glm4": ("Glm4ForCausalLM", {}),
    "gpt_oss": ("GptOssForCausalLM", {"sliding_window": 100, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "smollm3": ("SmolLM3ForCausalLM", {}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _MOE),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def make_model(family: str, **overrides: Any) -> Any:
    """A model of a family in eval mode, the same whenever it is made."""
    name, settings = FAMILIES[family]
    cls: Any = getattr(transformers, name)
    torch.manual_seed(0)
    config = cls.config_class(**(_BASE | settings | overrides))
    model = cls(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return one_after_another(model)


def make_vision_language_model() -> Any:
    """Gemma 3 with a vision tower, which makes IMAGE_TOKENS tokens of an image of 64 x 64."""
    vision: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
    }
    config = transformers.Gemma3Config(
        text_config=make_model("gemma3").config.to_dict(),
        vision_config=transformers.SiglipVisionConfig(**vision).to_dict(),
        mm_tokens_per_image=IMAGE_TOKENS,
        image_token_index=IMAGE,
        boi_token_index=6,
        eoi_token_index=7,
    )
    torch.manual_seed(0)
    model: Any = transformers.Gemma3ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.3)
    return model


def make_tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Tokens ``[batch, length]``, none of them padding."""
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def use(model: Any, name: str) -> None:
    """Set a model's attention; releases before 4.54 can do so only when they make it."""
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(name)
        return
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel):
            module.config._attn_implementation = name


def configure_sparse(model: Any, settings: Any) -> None:
    """Sparse however short the prompt is: on a GPU it would be dense."""
    configure(model, settings, when="always")


def in_double(model: Any) -> Any:
    """A copy of the model in double precision."""
    return copy.deepcopy(model).double()


def one_after_another(model: Any) -> Any:
    """The model, whose experts, if it has any, run in a loop: what groups them takes no double precision."""
    if hasattr(model, "set_experts_implementation") and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model


def interpreted(device: str) -> AbstractContextManager[Any]:
    """On a CPU run compiled functions as they are written: there every kernel takes about 15 seconds to compile."""
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager" if device == "cpu" else "default")
    return stance


@torch.no_grad()
def logits(model: Any, tokens: Tensor, **inputs: Any) -> Tensor:
    """Those of ``[B, S]`` tokens; without a cache where none is asked for."""
    with interpreted(tokens.device.type):
        result: Tensor = model(input_ids=tokens, **({"use_cache": False} | inputs)).logits
    return result
