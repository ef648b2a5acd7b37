"""Loading: what no config of a family can say, recorded in `config.json` and read by `from_pretrained`.

That is shapes of a model that was shrunk, and that weights were compressed. Transformers lets a library say what
becomes of a model between its config and its weights: a quantization method. This one changes no weight, and leaves an
ordinary model behind. Importing hf_prune registers it.
"""

import contextlib
import copy
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.initialization import no_init_weights, no_tie_weights
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..weights.compression import BITMASK
from .decompression import Decompress
from .entries import keep_entries_, lengths_of
from .families import FAMILIES
from .names import EXPERT_COUNTS, EXPERT_WIDTHS, QUERIES_OF_EACH, SIZES_OF_HEADS, SIZES_OF_NEURONS

METHOD = "hf_prune"
_KEY = "quantization_config"
# Where modules write down the lengths of the axes of their weights.
WIDTHS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("out_features", "in_features"),
    Conv1D: ("nx", "nf"),
    nn.Embedding: ("num_embeddings", "embedding_dim"),
    nn.Conv2d: ("out_channels", "in_channels"),
    nn.BatchNorm2d: ("num_features",),
}
Shapes = dict[str, list[int]]
Attributes = dict[str, dict[str, int]]


class Record(QuantizationConfigMixin):
    """What a model has that its config does not say.

    Args:
        shapes: Parameter or buffer → shape.
        attributes: Module → its whole numbers.
        compressed: Tensor that is compressed in the files → shape.
        lengths: List of modules → how many of them there are.

    Raises:
        ValueError: if a shape or a size is not a positive whole number, a size is none that may be set, or a key is
            unknown.
    """

    def __init__(
        self,
        shapes: Shapes | None = None,
        attributes: Attributes | None = None,
        compressed: Shapes | None = None,
        lengths: dict[str, int] | None = None,
        **others: object,
    ) -> None:
        if unknown := sorted(set(others) - {"quant_method"}):
            raise ValueError(
                f"unknown key {', '.join(unknown)} beside the shapes of a pruned model. Was it saved by a newer "
                "version of hf_prune?"
            )
        self.quant_method = METHOD  # type: ignore[assignment]
        self.shapes = shapes = shapes or {}
        self.attributes = attributes = attributes or {}
        self.compressed = compressed = compressed or {}
        self.lengths = lengths = lengths or {}
        for field in ("shapes", "attributes", "compressed", "lengths"):
            what = getattr(self, field)
            if not isinstance(what, dict):
                raise ValueError(f"{field!r} of a pruned model, recorded in config.json, must be an object: {what!r}.")
        for name, shape in [*shapes.items(), *compressed.items()]:
            if not isinstance(shape, list) or not shape or not all(_is_size(length) for length in shape):
                raise ValueError(f"the recorded shape of {name!r} must be positive whole numbers, got {shape!r}.")
        for name, length in lengths.items():
            if not _is_size(length):
                raise ValueError(f"the recorded length of {name!r} must be a positive whole number, got {length!r}.")
        for name, values in attributes.items():
            if not isinstance(values, dict) or not all(_is_size(value) for value in values.values()):
                raise ValueError(f"the recorded sizes of {name!r} must be positive whole numbers, got {values!r}.")
            if strange := sorted(set(values) - size_names()):
                raise ValueError(f"the recorded sizes of {name!r} hold {', '.join(strange)}, which may not be set.")

    def __repr__(self) -> str:
        return f"{type(self).__qualname__} {self.to_json_string()}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON, without what is empty."""
        return {key: value for key, value in super().to_dict().items() if value}

    def write_(self, model_config: PretrainedConfig) -> None:
        """Puts itself into a model's config, as it is in one that was read from a file; nothing, if it is empty."""
        if self.shapes or self.attributes or self.compressed or self.lengths:
            model_config.quantization_config = self.to_dict()
        elif hasattr(model_config, "quantization_config"):
            del model_config.quantization_config


# Where a quantization_config is given too, Transformers says that the model is quantized with a class of this name.
Record.__name__ = (
    "no method (hf_prune has recorded shapes or compression in its place: load the model without quantization_config "
    "and quantize it then; or prune with uniform=True and save with compress=False, so that nothing is recorded)"
)


class RecordQuantizer(HfQuantizer):
    """Gives a model that has no weights yet the shapes that were recorded, and weights that were compressed."""

    requires_calibration = False
    # Its weights are ordinary ones. Trainer asks for the second before it trains.
    is_trainable = is_qat_trainable = is_compileable = True
    quantization_config: Record

    def get_weight_conversions(self) -> list[WeightConverter]:
        """How weights are made of what is in the files, beside what Transformers does itself."""
        return [
            WeightConverter([f"^{re.escape(name)}{BITMASK}", f"^{re.escape(name)}"], f"^{name}", [Decompress(shape)])
            for name, shape in self.quantization_config.compressed.items()
        ]

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        # A whole that was put together from shrunk parts has their records in their configs, and none of its own:
        # Transformers hands over that of its decoder or text model.
        models = [each for each in model.modules() if isinstance(each, PreTrainedModel)]
        parts = [each for each in models if each.config is not model.config and recorded_in(each.config)]
        self._is_joined = bool(parts) and not _names_modules_of(model, self.quantization_config)
        for part in parts if self._is_joined else ():
            _apply_(part, Record(**recorded_in(part.config)))
        self._shapes = {} if self._is_joined else _apply_(model, self.quantization_config)
        self._built = {name: parameter.shape for name, parameter in model.named_parameters()}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for name, parameter in model.named_parameters():  # Transformers compares them itself only since 5.23.
            if parameter.shape != self._built.get(name, parameter.shape):
                raise ValueError(
                    f"{name!r} has shape {list(parameter.shape)} in the files, and {list(self._built[name])} in the "
                    "model. Load it with the config that it was saved with; or, for ignore_mismatched_sizes, by "
                    "Transformers 5.23 or later."
                )
        # It is no quantized model, and is saved with the shapes that it has, without compression.
        self.remove_quantization_config(model)
        if self._is_joined:
            record_shapes_(model)
        else:
            record = self.quantization_config
            Record(self._shapes, record.attributes, lengths=record.lengths).write_(model.config)
        conversions = getattr(model, "_weight_conversions", None) or []
        ours = [c for c in conversions if any(isinstance(op, Decompress) for op in getattr(c, "operations", []))]
        model._weight_conversions = [c for c in conversions if c not in ours]  # type: ignore[assignment]

    def is_serializable(self, **kwargs: Any) -> bool:
        """All that it needs is in the config."""
        return True


# Not by `register_quantizer`, which refuses a name that is taken: hf_prune may be imported anew, in a notebook.
AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD], AUTO_QUANTIZER_MAPPING[METHOD] = Record, RecordQuantizer


@contextlib.contextmanager
def recorded_compression(model_config: PretrainedConfig, shapes: Shapes) -> Iterator[None]:
    """A context in which a model's config says which tensors are compressed; afterwards it is as it was."""
    before = copy.deepcopy(getattr(model_config, "quantization_config", None) or {})
    if not isinstance(before, dict) or before.get("quant_method", METHOD) != METHOD:
        raise ValueError("the model is quantized, and cannot be compressed as well. Set compress=False.")
    Record(**{**before, "compressed": shapes}).write_(model_config)
    try:
        yield
    finally:
        Record(**before).write_(model_config)


def can_say(model_config: PretrainedConfig, fields: Mapping[str, int]) -> bool:
    """Whether a config of this family may have these values."""
    try:
        type(model_config).from_dict({**model_config.to_dict(), **fields})
    except (ValueError, StrictDataclassError):
        return False
    return True


def record_shapes_(model: PreTrainedModel) -> None:
    """Records in a model's config the shapes that it does not say. If it says all, it stays an ordinary one."""
    said = build_empty(type(model), model.config)
    # What the class does not build by itself, such as a head that its owner has put there, is no business of ours.
    expected = {name: list(tensor.shape) for name, tensor in _tensors(said)}
    shapes = {name: list(tensor.shape) for name, tensor in _tensors(model) if name in expected}
    sizes, lengths = _sizes(said), lengths_of(said)
    attributes = {
        name: {key: value for key, value in own.items() if sizes[name].get(key) != value}
        for name, own in _sizes(model).items()
        if name in sizes
    }
    Record(
        {name: shape for name, shape in shapes.items() if expected[name] != shape},
        {name: own for name, own in attributes.items() if own},
        lengths={name: left for name, left in lengths_of(model).items() if left < lengths.get(name, 0)},
    ).write_(model.config)


def build_recorded(kind: type[PreTrainedModel], model_config: PretrainedConfig) -> PreTrainedModel:
    """A model without weights, as its config and the shapes that are recorded in it describe it."""
    model = build_empty(kind, model_config)
    if record := recorded_in(model_config):
        _apply_(model, Record(**record))
    return model


def build_empty(kind: type[PreTrainedModel], model_config: PretrainedConfig) -> PreTrainedModel:
    """A model without weights, as its config alone describes it; an error if its class needs more."""
    try:
        with torch.device("meta"), no_init_weights(), no_tie_weights():
            return kind(copy.deepcopy(model_config))
    except TypeError as error:
        raise ValueError(
            f"{kind.__name__} cannot be built from its config alone ({error}), and so not be loaded either. "
            "Shrink the model inside of it, such as model.base_model."
        ) from error


def recorded_in(model_config: PretrainedConfig | Mapping[str, Any]) -> dict[str, Any]:
    """What hf_prune has recorded in a model's config, or in its JSON; empty if that is nothing."""
    found = model_config.get(_KEY) if isinstance(model_config, Mapping) else getattr(model_config, _KEY, None)
    return found if isinstance(found, dict) and found.get("quant_method") == METHOD else {}


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def size_names() -> set[str]:
    """The whole numbers of modules that a file may set: widths, and what families count by heads and neurons."""
    parts = [part for family in FAMILIES.values() for stack in family for part in stack.parts]
    counted = {path.rpartition(".")[2] for part in parts for path in part.attributes}
    found = {name for names in (*SIZES_OF_HEADS, *SIZES_OF_NEURONS, EXPERT_COUNTS, EXPERT_WIDTHS) for name in names}
    return {"groups", *QUERIES_OF_EACH, *counted, *found, *(width for widths in WIDTHS.values() for width in widths)}


def _sizes(model: nn.Module) -> Attributes:
    names = size_names()
    return {
        name: {key: value for key, value in vars(module).items() if key in names and _is_size(value)}
        for name, module in model.named_modules(remove_duplicate=False)
    }


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _apply_(model: PreTrainedModel, record: Record) -> Shapes:
    """Gives a model on the meta device its recorded shapes, as far as it has what they are of.

    Returns:
        The recorded shapes as they are in this model, which may have another number of labels.
    """
    shapes = dict(record.shapes)
    if record.shapes and not _names_modules_of(model, record):
        raise _other_model(model, next(iter(record.shapes)))
    for name, length in record.lengths.items():
        modules = _find(model, name)
        if modules is not None and length > lengths_of(modules).get("", 0):
            raise _other_model(model, name)
        if modules is not None:
            keep_entries_(modules, range(length))
            # What holds them would draw weights for as many as the config says.
            for each in filter(None, (modules, _find(model, name.rpartition(".")[0]))):
                each._is_hf_initialized = True  # type: ignore[assignment]
    for name, shape in record.shapes.items():
        path, _, attribute = name.rpartition(".")
        module = _find(model, path)
        if module is None:
            continue
        tensor = getattr(module, attribute, None)
        if not torch.is_tensor(tensor) or tensor.ndim != len(shape):
            raise _other_model(model, name)
        if attribute == "weight":
            shape = _with_own_widths(module, shape, record.attributes.get(path, {}))
        shapes[name] = shape
        empty = tensor.new_empty(shape)
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        setattr(module, attribute, empty)
    for name, values in record.attributes.items():
        module = _find(model, name)
        for key, value in values.items() if module is not None else ():
            if not _is_size(vars(module).get(key)):
                raise _other_model(model, f"{name}.{key}")
            setattr(module, key, value)
    return shapes


def _with_own_widths(module: nn.Module, shape: list[int], recorded: Mapping[str, int]) -> list[int]:
    """The shape of a weight, where the module says itself how wide an axis is that has lost nothing.

    Of a classifier that reads pruned channels only the inputs are recorded; its labels are those of the config.
    """
    widths = next((names for kind, names in WIDTHS.items() if isinstance(module, kind)), ())
    # Of a convolution with groups an axis is shorter than its width.
    own = [None if name in recorded else getattr(module, name) for name in widths]
    built = list(module.weight.shape)  # type: ignore[arg-type]
    own += [None] * (len(shape) - len(own))
    return [b if width == b else each for each, b, width in zip(shape, built, own, strict=True)]


def _names_modules_of(model: PreTrainedModel, record: Record) -> bool:
    """Whether a record holds the shapes of tensors that the model has."""
    return any(_find(model, name.rpartition(".")[0]) for name in record.shapes)


def _find(model: PreTrainedModel, path: str) -> nn.Module | None:
    """A module by its name in the model that was saved, which may have had another head, or none.

    None if it belongs to what this model does not have: another head, or an encoder.
    """
    inner = path.partition(".")[2]  # Without the name of a base model, which another class calls otherwise.
    for root, own in itertools.product((model, model.base_model), filter(None, (path, inner))):
        try:
            return root.get_submodule(own)
        except AttributeError:
            continue
    return None


def _other_model(model: PreTrainedModel, name: str) -> ValueError:
    return ValueError(
        f"the recorded shapes are of another model: {type(model).__name__} has no {name!r} of that kind. Was it saved "
        "by another version of Transformers?"
    )
