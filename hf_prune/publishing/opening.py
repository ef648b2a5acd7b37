"""Opening: saved models of the classes that Transformers has, and their tokenizers or processors."""

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.feature_extraction_utils import FeatureExtractionMixin
from transformers.image_processing_base import ImageProcessingMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..structures.loading import build_recorded
from .folders import SavedModel, read_json

logger = logging.getLogger(__name__)

Processing = PreTrainedTokenizerBase | ImageProcessingMixin | FeatureExtractionMixin | ProcessorMixin

# What Transformers may raise where a config, or a file beside it, is damaged.
DAMAGED = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, StrictDataclassError, TypeError,
    ValueError,
)  # fmt: skip
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")


def open_model(folder: Path, device: str = "cpu") -> PreTrainedModel:
    """Loads a model in the dtype of its files, the widest if they have several, in evaluation mode.

    Raises:
        ValueError: if there is none in safetensors, its config names no class of Transformers, a file is damaged,
            weights are missing, or there is no such device.
    """
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # the former where torch has no CUDA at all
        raise ValueError(f"there is no device {device!r} here: {error}") from error
    dtype = SavedModel(folder).dtype
    kind, config = _kind_of(folder)
    try:
        loaded: Any = kind.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except DAMAGED as error:
        raise ValueError(f"{folder} cannot be loaded: {error}") from error
    model, found = loaded
    if found["missing_keys"]:
        missing = ", ".join(sorted(found["missing_keys"]))
        raise ValueError(f"the files in {folder} lack weights of a {kind.__name__}, which would be random: {missing}.")
    if found["unexpected_keys"]:
        strange = ", ".join(sorted(found["unexpected_keys"]))
        logger.warning("A %s has no place for these weights, and they are left out: %s.", kind.__name__, strange)
    model.eval()
    moved: PreTrainedModel = model.to(torch.device(device))
    return moved


def open_empty(folder: Path) -> PreTrainedModel:
    """A saved model in its recorded shapes, with weights that nobody has set.

    They are not on the meta device, where structures cannot be looked for; yet they take no memory, since a system
    gives it page by page, when one is touched.
    """
    kind, config = _kind_of(folder)
    return build_recorded(kind, config).to_empty(device="cpu")


def open_processing(folder: Path) -> list[Processing]:
    """Loads what was saved with a model to prepare its inputs.

    Returns:
        A processor; or a tokenizer, an image processor or feature extractor, or both; or nothing.
    """
    try:
        if (folder / "processor_config.json").is_file():
            return [AutoProcessor.from_pretrained(folder, trust_remote_code=False)]
        found: list[Any] = []
        if any((folder / file).is_file() for file in _TOKENIZERS):
            found.append(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
        if (folder / "preprocessor_config.json").is_file():
            is_of_sound = "sampling_rate" in read_json(folder / "preprocessor_config.json")
            kind = AutoFeatureExtractor if is_of_sound else AutoImageProcessor
            found.append(kind.from_pretrained(folder, trust_remote_code=False))
        return found
    except DAMAGED as error:
        raise ValueError(f"what is saved in {folder} to prepare inputs cannot be loaded: {error}") from error


def _kind_of(folder: Path) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """The class of a saved model, and its config."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a saved model: it has no config.json.")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except DAMAGED as error:
        raise ValueError(f"{folder / 'config.json'} is damaged, or of no model of Transformers: {error}") from error
    if not config.architectures:
        raise ValueError(
            f"{folder / 'config.json'} names no architecture. Save the model with save_pretrained, which writes it."
        )
    name = config.architectures[0]
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise ValueError(
            f"{folder / 'config.json'} names {name!r} as its architecture, which is no model of Transformers. Models "
            "with code of their own are not loaded from the command line: call hf_prune from a script."
        )
    # Any other name is that of code on the Hub.
    configs = [config, *(getattr(config, part, None) for part in config.sub_configs)]
    if any(getattr(each, "_attn_implementation", None) not in (None, "eager", "sdpa") for each in configs):
        config._attn_implementation = "eager"
    return kind, config
