"""Opening: saved models of the classes that Transformers has, and their tokenizers or processors."""

from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoProcessor, PretrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.feature_extraction_utils import FeatureExtractionMixin
from transformers.image_processing_base import ImageProcessingMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .structures.loading import build_recorded

Processing = PreTrainedTokenizerBase | ImageProcessingMixin | FeatureExtractionMixin | ProcessorMixin

_FILES_OF_PROCESSING = ("processor_config.json", "tokenizer_config.json", "preprocessor_config.json")


def open_model(folder: Path, device: str = "cpu") -> PreTrainedModel:
    """Loads a model in the dtype of its files, in evaluation mode.

    Args:
        folder: Where it is.
        device: Where to.

    Raises:
        ValueError: if there is none, its config names no class of Transformers, or there is no such device.
        OSError: if there are no weights in safetensors.
    """
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # the former where torch has no CUDA at all
        raise ValueError(f"there is no device {device!r} here: {error}") from error
    kind, config = _kind_of(folder)
    try:
        model: PreTrainedModel = kind.from_pretrained(folder, config=config, dtype="auto", use_safetensors=True)
    except RuntimeError as error:  # Shapes that do not fit, in the words of Transformers.
        raise ValueError(f"{folder} cannot be loaded: {error}") from error
    model.eval()
    return model.to(torch.device(device))  # type: ignore[arg-type]


def open_empty(folder: Path) -> PreTrainedModel:
    """A saved model in its recorded shapes, with weights that nobody has set.

    They are not on the meta device, where structures cannot be looked for; yet they take no memory, since a system
    gives it page by page, when one is touched.

    Args:
        folder: Where it is.

    Raises:
        ValueError: as `open_model` does.
    """
    kind, config = _kind_of(folder)
    return build_recorded(kind, config).to_empty(device="cpu")


def open_processing(folder: Path) -> Processing | None:
    """Loads the processor, tokenizer, image processor or feature extractor that was saved with a model.

    Args:
        folder: Where the model is.

    Returns:
        Whichever says most; None if there is none.

    Raises:
        ValueError, OSError: if it cannot be loaded.
    """
    if not any((folder / file).is_file() for file in _FILES_OF_PROCESSING):
        return None
    found: Processing = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    return found


def _kind_of(folder: Path) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """The class of a saved model, and its config."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a saved model: it has no config.json.")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except StrictDataclassError as error:
        raise ValueError(f"{folder / 'config.json'} is damaged: {error}") from error
    if not config.architectures:
        raise ValueError(
            f"{folder / 'config.json'} names no architecture. Save the model with save_pretrained, which writes it."
        )
    name = config.architectures[0]
    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise ValueError(
            f"{folder / 'config.json'} names {name!r} as its architecture, which is no model of Transformers. Models "
            "with code of their own are not loaded from the command line: call hf_prune from a script."
        )
    return kind, config
