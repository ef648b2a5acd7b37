"""Weights with other names in files than in memory, which Trainer leaves as they are when it loads a checkpoint."""

import copy
from pathlib import Path
from typing import TypeGuard

from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from ..distributed.shards import has_shards
from ..distributed.zero import has_partitions


def load_renamed_weights_(model: nn.Module, folder: Path) -> None:
    """Loads a checkpoint's weights if its names for them are not the model's; does nothing otherwise.

    `save_pretrained` writes the names of the Hub, and for some models they are not those in memory.
    `from_pretrained` translates; Trainer, when it resumes and when it brings back the best model, does not, and
    silently leaves such weights as they are (transformers issue 48805).

    Args:
        model: The model, unwrapped; changed in place.
        folder: The checkpoint.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not has_other_names_in_files(model) or not files:
        return
    saved = {name: tensor for file in files for name, tensor in load_file(file).items()}
    # Loading puts new parameters into a model, and the optimizer holds the old ones: so a copy is loaded.
    loaded = copy.deepcopy(model)
    translate = LoadStateDictConfig(weight_mapping=get_model_conversion_mapping(loaded))  # type: ignore[arg-type]
    info, _ = convert_and_load_state_dict_in_model(loaded, saved, translate)
    found = {name: tensor for name, tensor in loaded.state_dict().items() if name not in info.missing_keys}
    model.load_state_dict(found, strict=False)


def has_other_names_in_files(model: nn.Module) -> TypeGuard[PreTrainedModel]:
    """Whether a saved model has other names for its weights than the model in memory, as ViT and fused experts do.

    What Trainer saves of sharded models to resume them, and DeepSpeed of any, has the names in memory.
    """
    if not isinstance(model, PreTrainedModel) or has_shards(model) or has_partitions(model):
        return False
    return bool(get_model_conversion_mapping(model, add_legacy=False))
