"""Runs a recipe on the processes of a CPU by a config for GPUs: `accelerate launch … -m tests.recipes.on_cpu NAME …`.

accelerate knows no FSDP on CPUs, and would quietly train with DistributedDataParallel; FSDP2 itself runs there.
"""

import importlib
import runpy
import sys
from pathlib import Path

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import TrainingArguments

RECIPES = Path(__file__).parents[2] / "recipes"


class OnGPUs(TrainingArguments):
    """Arguments of processes that accelerate takes for those of GPUs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


if __name__ == "__main__":
    sys.path.insert(0, str(RECIPES))
    # By the name of this file, by which it is found again where arguments are saved.
    importlib.import_module("common.arguments").TrainingArguments = importlib.import_module(__spec__.name).OnGPUs
    del sys.argv[0]
    runpy.run_path(str(RECIPES / sys.argv[0]), run_name="__main__")
