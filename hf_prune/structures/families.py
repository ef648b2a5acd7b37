"""Families: where the heads, neurons and layers of a model are.

One more family is one more line in `FAMILIES`; a user's own comes with `describe_family`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

Layout = int | Literal["q+k+v", "q"]
"""How structures lie in the output of a projection: the number of equal parts into which it is divided, within each of
which structures follow each other. 1, or 3 where the queries of all heads come first, then all keys, then all values.
"q+k+v" stands for three such parts of which keys and values are narrower, under grouped-query attention; "q", which
descriptions do not need, for the first of them alone."""


@dataclass(frozen=True)
class Heads:
    """The attention heads of a layer; under grouped-query attention a key-value head and the queries that read it.

    Attributes:
        module: The attention, as its path from the layer.
        rows: Its projections to queries, keys and values → the layouts of their outputs.
        columns: Its output projection.
        size: Its attribute that holds the width of a head; or empty, if widths differ between projections.
        count: Its attribute, or else the config's, that says how many heads there are, if `size` is empty.
        attributes: Its attributes that go with the number of heads.
        fields: Fields of the config that say how many heads there are: of queries, and of keys and values. Empty
            where no config can say fewer heads than `hidden_size / size`.
        fixed: Field of the config that has to be written down when `fields` change, since its default follows from
            them: the width of a head.
        tables: Its embeddings with a column for each head, where a layer has them; that layer stays.
        beside: Its other parameters that have something for each head, such as biases of positions, sinks and norms →
            the axis along which they do.
        is_shared: Whether the heads of all layers go together, because they share a position bias.
    """

    module: str
    rows: Mapping[str, Layout]
    columns: str
    size: str = "head_dim"
    count: str = ""
    attributes: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    fixed: str | None = None
    tables: tuple[str, ...] = ()
    beside: Mapping[str, int] = field(default_factory=dict)
    is_shared: bool = False
    kind: ClassVar = "head"


@dataclass(frozen=True)
class Neurons:
    """The neurons of a feed-forward network: what lies between its two matrices.

    Attributes:
        module: The network, as its path from the layer; empty if it is in the layer itself.
        rows: The projections to neurons, gates included → layouts, as for `Heads`.
        columns: The projection back.
        attributes: Its attributes that go with the number of neurons.
        fields: Fields of the config that say how many neurons there are.
        beside: As for `Heads`.
    """

    module: str
    rows: Mapping[str, Layout]
    columns: str
    attributes: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    beside: Mapping[str, int] = field(default_factory=dict)
    tables: ClassVar = ()
    is_shared: ClassVar = False
    kind: ClassVar = "neuron"


Part = Heads | Neurons
"""What a layer has structures in."""


@dataclass(frozen=True)
class Stack:
    """Layers, one behind the other.

    Attributes:
        layers: The list of layers, as its path from the base model.
        parts: What each layer is made of; of several that describe one module under the names of different versions
            of Transformers, the one that is there counts.
        fields: Fields of the config that say how many layers there are.
        norm_first: Whether norms come before the projections of a layer. Where one comes behind a sum, a layer whose
            outputs are zero still changes what it hands on, and no layer can be removed.
        norm_first_field: Field of the config that says so instead.
        stay: Kinds of layers that cannot go, as `layer_kind` tells them apart.
    """

    layers: str
    parts: tuple[Part, ...]
    fields: tuple[str, ...] = ("num_hidden_layers",)
    norm_first: bool = True
    norm_first_field: str | None = None
    stay: tuple[str, ...] = ()


Family = tuple[Stack, ...]


def _heads(module: str, projections: str, **others: Any) -> Heads:
    """Heads whose queries, keys and values have a projection each; the last one is the output."""
    *rows, columns = projections.split()
    return Heads(module, dict.fromkeys(rows, 1), columns, **others)


def _neurons(module: str, projections: str, *fields: str, **others: Any) -> Neurons:
    """Neurons behind some projections; the last one is the projection back."""
    *rows, columns = projections.split()
    return Neurons(module, dict.fromkeys(rows, 1), columns, fields=fields, **others)


def _family(layers: str, *parts: Part, **others: Any) -> Family:
    """A family of one stack."""
    return (Stack(layers, parts, **others),)


_LLAMA = _family(
    "layers",
    _heads(
        "self_attn",
        "q_proj k_proj v_proj o_proj",
        fields=("num_attention_heads", "num_key_value_heads"),
        fixed="head_dim",
    ),
    _neurons("mlp", "gate_proj up_proj down_proj", "intermediate_size", attributes=("intermediate_size",)),
)
_BERT = _family(
    "encoder.layer",
    *(
        _heads(
            attention,
            "self.query self.key self.value output.dense",
            size="self.attention_head_size",
            attributes=("self.num_attention_heads", "self.all_head_size"),
        )
        for attention in ("attention", "crossattention")
    ),
    _neurons("", "intermediate.dense output.dense", "intermediate_size"),
    norm_first=False,
)
_VIT = _family(
    "layers",
    _heads(
        "attention",
        "q_proj k_proj v_proj o_proj",
        attributes=("num_attention_heads",),
        fields=("num_attention_heads",),
        fixed="head_dim",
    ),
    _neurons("mlp", "fc1 fc2", "intermediate_size"),
)
_DINOV2 = _family(
    "encoder.layer",
    # The width of a head follows from the config in Transformers 5.17, and is a field of it in 5.23.
    _heads("attention", "q_proj k_proj v_proj o_proj", attributes=("num_attention_heads",)),
    _heads(
        "attention",
        "attention.query attention.key attention.value output.dense",
        size="attention.attention_head_size",
        attributes=("attention.num_attention_heads", "attention.all_head_size"),
    ),
    _neurons("mlp", "fc1 fc2"),
    _neurons("mlp", "gate_proj up_proj down_proj"),
    Neurons("mlp", {"weights_in": 2}, "weights_out"),
)
_T5_ATTENTION: dict[str, Any] = dict(
    size="key_value_proj_dim", attributes=("n_heads", "inner_dim"), fields=("num_heads",), is_shared=True
)
_T5_FEED_FORWARD = tuple(
    _neurons(f"layer.{i}.DenseReluDense", rows, "d_ff") for rows in ("wi wo", "wi_0 wi_1 wo") for i in (1, 2)
)
_T5_SELF = _heads("layer.0.SelfAttention", "q k v o", tables=("relative_attention_bias",), **_T5_ATTENTION)
_T5_CROSS = _heads("layer.1.EncDecAttention", "q k v o", **_T5_ATTENTION)
_T5: Family = (
    Stack("encoder.block", (_T5_SELF, *_T5_FEED_FORWARD), ("num_layers",)),
    Stack("decoder.block", (_T5_SELF, _T5_CROSS, *_T5_FEED_FORWARD), ("num_decoder_layers",)),
)


def _bart(norm_first: bool) -> Family:
    """An encoder and a decoder, whose widths are fields of their own."""
    projections, attributes = "q_proj k_proj v_proj out_proj", ("num_heads",)
    own, cross = (_heads(name, projections, attributes=attributes) for name in ("self_attn", "encoder_attn"))
    return tuple(
        Stack(
            f"{side}.layers",
            (*attentions, _neurons("", "fc1 fc2", f"{side}_ffn_dim")),
            (f"{side}_layers",),
            norm_first,
        )
        for side, attentions in (("encoder", (own,)), ("decoder", (own, cross)))
    )


FAMILIES: dict[str, Family] = {
    "gpt_neo": _family(
        "h",
        _heads("attn.attention", "q_proj k_proj v_proj out_proj", attributes=("num_heads",)),
        _neurons("mlp", "c_fc c_proj", "intermediate_size"),
        fields=("num_layers",),
    ),
    "gpt2": _family(
        "h",
        Heads("attn", {"c_attn": 3}, "c_proj", attributes=("num_heads", "split_size")),
        Heads("crossattention", {"q_attn": 1, "c_attn": 2}, "c_proj", attributes=("num_heads", "split_size")),
        _neurons("mlp", "c_fc c_proj", "n_inner"),
        fields=("n_layer",),
    ),
    "gpt_neox": _family(
        "layers",
        _heads("attention", "query_key_value dense", size="head_size"),
        _neurons("mlp", "dense_h_to_4h dense_4h_to_h", "intermediate_size"),
    ),
    "opt": _family(
        "decoder.layers",
        _heads("self_attn", "q_proj k_proj v_proj out_proj", attributes=("num_heads",)),
        _neurons("", "fc1 fc2", "ffn_dim"),
        norm_first_field="do_layer_norm_before",
    ),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"), _LLAMA),
    **dict.fromkeys(("bert", "roberta"), _BERT),
    "distilbert": _family(
        "transformer.layer",
        _heads("attention", "q_lin k_lin v_lin out_lin", size="attention_head_size", attributes=("n_heads",)),
        _neurons("ffn", "lin1 lin2", "hidden_dim"),
        fields=("n_layers",),
        norm_first=False,
    ),
    **dict.fromkeys(("vit", "deit"), _VIT),
    "dinov2": _DINOV2,
    "t5": _T5,
    "bart": _bart(norm_first=False),
    "whisper": _bart(norm_first=True),
}
"""`model_type` of a config → where its structures are."""


HOW_TO_ADD = (
    'Describe it in a dozen lines: describe_family({!r}, Stack("layers", (Heads(...), Neurons(...)))), all of which '
    "hf_prune exports."
)
"""What to do where a family is not known, for messages."""
_described: dict[str, Family] = {}


def is_described(model_type: str) -> bool:
    """Whether a user has described a family, so that it has yet to be proved."""
    return model_type in _described and FAMILIES.get(model_type) is _described[model_type]


def describe_family(model_type: str, *stacks: Stack, like: str | None = None) -> None:
    """Tells where the heads, neurons and layers of a family are, in place of what was known of it.

    Families that are in no table are found without a description, where they can be. What is described is tried on a
    small model of the class first: what cannot be removed from it, up to rounding, is an error before anything is
    pruned.

    What is recorded in a `config.json` needs it too where it is loaded.

    Args:
        model_type: `model_type` of its config.
        stacks: Its stacks of layers.
        like: In place of stacks, a family that looks the same, such as "t5" for "mt5".

    Raises:
        TypeError: if one of the stacks is something else.
        ValueError: if there are neither stacks nor `like`, or both; or if the other family is not in the table.

    Example:
        >>> describe_family(
        ...     "my_model",
        ...     Stack(
        ...         "layers",
        ...         (
        ...             Heads("attn", {"q": 1, "k": 1, "v": 1}, "o", size="head_dim", attributes=("num_heads",)),
        ...             Neurons("mlp", {"up": 1}, "down", fields=("intermediate_size",)),
        ...         ),
        ...     ),
        ... )
    """
    if bool(stacks) == (like is not None):
        raise ValueError(f"a family is described by Stacks, or is like another one; {model_type!r} got both or none.")
    if like is not None and like not in FAMILIES:
        raise ValueError(f"like must be one of {', '.join(FAMILIES)}; got {like!r}.")
    for stack in stacks:
        if not isinstance(stack, Stack):
            raise TypeError(f"a family is described by Stacks, got {type(stack).__name__}.")
    FAMILIES[model_type] = _described[model_type] = stacks if like is None else FAMILIES[like]
