"""What differs between model families: token ids, logit shift, attention, checkpoint names, config fields.

Sources: LLaDA-8B's and Dream-7B's published `config.json` and safetensors indexes; the Llama and Qwen2 layouts
of transformers. Adding a family means one entry in `LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from d3llm_ray.errors import InputError, require, unknown
from d3llm_ray.models.config import ModelConfig

JsonDict = dict[str, Any]
Attention = Literal["full", "block-causal", "causal"]


@dataclass(frozen=True)
class Layout:
    """How one family writes its checkpoints. `layer_names` are relative to layer N's prefix."""

    family: str
    top_names: Mapping[str, str]
    layer_prefix: str
    layer_names: Mapping[str, str]
    read_config: Callable[[JsonDict], ModelConfig]
    logit_shift: bool
    attention: Attention
    turn_end_token_id: int | None  # of the published vocabulary; also ends an answer
    chat_template: str

    def checkpoint_name(self, name: str) -> str:
        """Map a parameter name of `Transformer` to the checkpoint's."""
        if not name.startswith("layers."):
            return self.top_names[name]
        _, number, rest = name.split(".", 2)
        module, kind = rest.rsplit(".", 1)
        return f"{self.layer_prefix}{number}.{self.layer_names[module]}.{kind}"


@dataclass(frozen=True)
class Family:
    """One loaded checkpoint's conventions: what a decoder or trainer must know besides the weights."""

    name: str
    layout: Layout
    mask_token_id: int | None  # None: a causal model, which no diffusion decoder can decode
    eos_token_id: int
    pad_token_id: int
    stop_token_ids: tuple[int, ...]
    block_size: int  # default decoding block in tokens
    config: JsonDict  # config.json as read, written back unchanged
    generation_config: JsonDict

    @property
    def logit_shift(self) -> bool:
        """True when row i of the logits predicts token i + 1 (Dream, causal models)."""
        return self.layout.logit_shift


def _field(config: JsonDict, name: str) -> Any:
    if config.get(name) is None:
        raise InputError(f"config.json: field {name!r} is missing")
    return config[name]


def _expect(config: JsonDict, accepted: Mapping[str, object]) -> None:
    """Refuse architecture switches that this transformer does not implement."""
    for name, value in accepted.items():
        require(config.get(name, value) == value, f"config.json: {name}", config.get(name), repr(value))


def _refuse_rotary_scaling(config: JsonDict) -> None:
    """Rotary embedding is the plain one, however a config spells another (also one mapping a layer type)."""
    for field in ("rope_scaling", "rope_parameters"):
        settings = config.get(field) or {}
        require(isinstance(settings, dict), f"config.json: {field}", settings, "a mapping, or null")
        nested = {f".{name}": inner for name, inner in settings.items() if isinstance(inner, dict)}
        for where, values in {"": settings, **nested}.items():
            kind = values.get("rope_type") or values.get("type") or "default"
            accepted = "'default' (rotary scaling is not implemented)"
            require(kind == "default", f"config.json: {field}{where}.rope_type", kind, accepted)
        accepted = "one for all layers"
        require(not nested, f"config.json: {field}", f"settings by layer type: {', '.join(settings)}", accepted)
        part = settings.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
        require(part == 1.0, "config.json: partial_rotary_factor", part, "1.0")


def _llada_config(config: JsonDict) -> ModelConfig:
    _expect(config, {"block_type": "llama", "activation_type": "silu", "layer_norm_type": "rms", "rope": True})
    _expect(config, dict.fromkeys(("alibi", "include_bias", "bias_for_layer_norm", "scale_logits"), False))
    _expect(config, dict.fromkeys(("input_emb_norm", "attention_layer_norm"), False))
    heads = _field(config, "n_heads")
    return ModelConfig(
        vocab_size=config.get("embedding_size") or _field(config, "vocab_size"),
        hidden_size=_field(config, "d_model"),
        num_layers=_field(config, "n_layers"),
        num_heads=heads,
        num_kv_heads=config.get("n_kv_heads") or heads,
        intermediate_size=_field(config, "mlp_hidden_size"),
        max_position_embeddings=_field(config, "max_sequence_length"),
        rope_theta=float(_field(config, "rope_theta")),
        rms_norm_eps=_field(config, "rms_norm_eps"),
        qkv_bias=bool(config.get("include_qkv_bias", False)),
        tie_word_embeddings=bool(config.get("weight_tying", False)),
    )


def _llama_config(config: JsonDict) -> ModelConfig:
    _expect(config, {"hidden_act": "silu", "use_sliding_window": False, "mlp_bias": False})
    heads = _field(config, "num_attention_heads")
    # transformers 5 writes rotary settings as a mapping, older files as one number.
    rotary = config.get("rope_scaling") or config.get("rope_parameters") or {}  # in transformers' order
    theta = rotary.get("rope_theta") or config.get("rope_theta")
    if not isinstance(theta, int | float):
        raise InputError(f"config.json: rope_theta: got {theta!r}; accepted: a number")
    return ModelConfig(
        vocab_size=_field(config, "vocab_size"),
        hidden_size=_field(config, "hidden_size"),
        num_layers=_field(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        intermediate_size=_field(config, "intermediate_size"),
        max_position_embeddings=_field(config, "max_position_embeddings"),
        rope_theta=float(theta),
        rms_norm_eps=_field(config, "rms_norm_eps"),
        qkv_bias=config["model_type"] != "llama",
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


_LLADA_TOP = {
    "embed_tokens.weight": "model.transformer.wte.weight",
    "norm.weight": "model.transformer.ln_f.weight",
    "lm_head.weight": "model.transformer.ff_out.weight",
}
_LLADA_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
_LLAMA_TOP = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_LLAMA_LAYER = {name: name for name in _LLADA_LAYER}

_LLADA_CHAT = (
    "{% for message in messages %}{% if loop.first %}{{ '<|startoftext|>' }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
_QWEN_CHAT = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant\n' }}"
)

_LLADA = Layout(
    family="llada",
    top_names=_LLADA_TOP,
    layer_prefix="model.transformer.blocks.",
    layer_names=_LLADA_LAYER,
    read_config=_llada_config,
    logit_shift=False,
    attention="full",
    turn_end_token_id=126348,
    chat_template=_LLADA_CHAT,
)


def _llama_layout(family: str, attention: Attention) -> Layout:
    return Layout(
        family=family,
        top_names=_LLAMA_TOP,
        layer_prefix="model.layers.",
        layer_names=_LLAMA_LAYER,
        read_config=_llama_config,
        logit_shift=True,
        attention=attention,
        turn_end_token_id=None if family == "llama" else 151645,
        chat_template=_QWEN_CHAT,
    )


EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # in a config of such models
FAST_DLLM_V2_MASK = 151665

LAYOUTS: dict[str, Layout] = {  # by config.json's model_type
    "llada": _LLADA,
    "Dream": _llama_layout("dream", "full"),
    "Fast_dLLM_Qwen": _llama_layout("fast_dllm_v2", "block-causal"),
    "qwen2": _llama_layout("qwen2", "causal"),
    "llama": _llama_layout("llama", "causal"),
}


def read_family(config: JsonDict, generation_config: JsonDict) -> tuple[ModelConfig, Family]:
    """Interpret the two JSON files of a checkpoint folder; raises `InputError` naming the field at fault."""
    model_type = _field(config, "model_type")
    experts = next((name for name in EXPERTS if config.get(name)), None)
    if experts is not None:
        raise InputError(f"config.json: {experts}: a mixture-of-experts model; accepted: dense models")
    if model_type not in LAYOUTS:
        raise unknown("config.json: model_type", model_type, LAYOUTS)
    layout = LAYOUTS[model_type]
    _refuse_rotary_scaling(config)
    shape = layout.read_config(config)
    eos = _field(config, "eos_token_id")
    eos_ids = [eos] if isinstance(eos, int) else list(eos)
    stops = generation_config.get("eos_token_id") or []
    stop_ids = [*eos_ids, *([stops] if isinstance(stops, int) else stops)]
    if layout.turn_end_token_id is not None and layout.turn_end_token_id < shape.vocab_size:
        stop_ids.append(layout.turn_end_token_id)
    mask = None
    if layout.attention != "causal":
        # Fast-dLLM v2's published config leaves the mask id to its code.
        default = FAST_DLLM_V2_MASK if layout.attention == "block-causal" else None
        mask = config.get("mask_token_id", default) or _field(config, "mask_token_id")
    pad = config.get("pad_token_id")
    family = Family(
        name=layout.family,
        layout=layout,
        mask_token_id=mask,
        eos_token_id=eos_ids[0],
        pad_token_id=eos_ids[0] if pad is None else pad,
        stop_token_ids=tuple(dict.fromkeys(stop_ids)),
        block_size=generation_config.get("block_size") or config.get("bd_size") or 32,
        config=config,
        generation_config=generation_config,
    )
    for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(family, name)
        accepted = f"a token id below vocab_size {shape.vocab_size}"
        require(value is None or 0 <= value < shape.vocab_size, f"config.json: {name}", value, accepted)
    return shape, family
