"""Names: what the configs and modules of Transformers call the numbers and widths of structures.

Fields are those of configs, attributes those of modules. Where several names fit a number, the first one counts.
"""

QUERY_HEAD_FIELDS = (
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
)
KEY_VALUE_HEAD_FIELDS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
HEAD_WIDTH_FIELDS = (
    "head_dim",
    "d_kv",
    "attention_head_size",
    "kv_channels",
    "v_head_dim",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "rotary_dim",
    "dim_head",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_head_dim",
    "index_head_dim",
)
LAYER_FIELDS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
)
NEURON_FIELDS = (
    "intermediate_size",
    "n_inner",
    "ffn_dim",
    "d_ff",
    "d_inner",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "moe_intermediate_size",
    "ffn_hidden_size",
    "hidden_dim",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
    "mlp_hidden_size",
    "dim_ff",
    "dff",
    "expert_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "dense_intermediate_size",
)
STREAM_WIDTH_FIELDS = (
    "hidden_size",
    "d_model",
    "n_embd",
    "dim",
    "embed_dim",
    "embedding_size",
    "emb_dim",
    "word_embed_proj_dim",
    "dim_model",
    "lru_width",
)
"""Fields that say how wide the residual stream is, or what is beside it."""

HEAD_COUNT_ATTRIBUTES = (
    "num_key_value_heads",
    "num_kv_heads",
    "n_kv_heads",
    "n_head_kv",
    "num_attention_heads",
    "num_heads",
    "n_heads",
    "n_head",
    "num_head",
    "attention_heads",
    "num_attn_heads",
    "nhead",
    "heads",
)
"""Attributes, and fields, that say how many heads an attention has. Key-value heads come first: queries go with
them."""

HEAD_WIDTH_ATTRIBUTES = (
    "head_dim",
    "attention_head_size",
    "head_size",
    "key_value_proj_dim",
    "d_kv",
    "dim_head",
    "size_per_head",
)
QUERIES_OF_EACH = ("num_key_value_groups",)
"""Attributes that say how many queries read each key-value head."""

SIZES_OF_HEADS = (
    (
        "num_attention_heads",
        "num_key_value_heads",
        "num_heads",
        "n_heads",
        "n_head",
        "num_head",
        "num_kv_heads",
        "n_kv_heads",
        "heads",
        "all_head_size",
        "inner_dim",
        "split_size",
        "attention_inner_dim",
        "attn_dim",
    ),
    ("embed_dim", "hidden_size", "d_model", "dim"),
)
"""Attributes that change with the number of heads: they count them, or say how wide all are together. Those that may
mean something else come last. A record in a saved config may set each of them when the model is loaded."""

SIZES_OF_NEURONS = (("intermediate_size", "ffn_dim", "hidden_dim", "d_ff", "inner_dim"),)
"""The same for neurons."""

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts")
"""Fields and attributes that say how many experts there are."""

EXPERTS_CHOSEN = (
    "top_k",
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
)
"""Fields and attributes that say how many experts a router chooses for each token."""

EXPERT_GROUPS = ("n_group", "num_group", "num_expert_group")
"""Fields and attributes that say how many groups experts are in, of which a router chooses some."""

EXPERT_WIDTHS = (
    "moe_intermediate_size",
    "expert_ffn_hidden_size",
    "intermediate_size",
    "intermediate_dim",
    "expert_dim",
)
"""Fields and attributes that say how many neurons one expert has."""
