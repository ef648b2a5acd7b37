"""A Trainer that trains a tiny model in a second."""

from collections.abc import Callable
from pathlib import Path

import transformers
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer, TrainingArguments

from tests.tiny import batch


def trainer_factory(folder: Path) -> Callable[..., Trainer]:
    """Builds Trainers on the CPU that train into `folder / "out"`: 6 steps of batch size 4; any argument overrides."""

    def make(model: nn.Module, *callbacks: transformers.TrainerCallback, cls: type = Trainer, **options) -> Trainer:
        names = ("train_dataset", "eval_dataset", "model_init")
        trainer_options = {name: options.pop(name) for name in names if name in options}
        arguments_class = options.pop("arguments_class", TrainingArguments)
        defaults = {
            "output_dir": str(folder / "out"),
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_strategy": "no",
            "dataloader_pin_memory": False,
        }
        arguments = arguments_class(**{**defaults, **options})
        if arguments.fsdp:
            # accelerate knows no FSDP on several processes of a CPU; FSDP2 itself does.
            assert arguments.device.type == "cpu"
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        if "train_dataset" not in trainer_options:
            trainer_options |= {"train_dataset": batch(model, 24), "eval_dataset": batch(model, 8, seed=1)}
        return cls(model, arguments, callbacks=list(callbacks), **trainer_options)

    return make


FSDP = {
    "fsdp": True,
    "fsdp_config": {
        "fsdp_version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "state_dict_type": "FULL_STATE_DICT",
    },
}
"""Options with which a Llama is trained with FSDP2."""


def zero(stage: int) -> dict[str, object]:
    """Options with which a model is trained with DeepSpeed."""
    auto = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_clipping", "gradient_accumulation_steps")
    zero_optimization: dict[str, object] = {"stage": stage}
    if stage == 3:  # Small parameters are divided too, and whole ones are saved.
        zero_optimization["stage3_param_persistence_threshold"] = 0
        zero_optimization["stage3_gather_16bit_weights_on_model_save"] = True
    return {"deepspeed": {**dict.fromkeys(auto, "auto"), "zero_optimization": zero_optimization}}


class Rates(transformers.TrainerCallback):
    """The learning rate with which each step is taken."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])
