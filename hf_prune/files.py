"""Files of tensors that appear whole or not at all."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file


def save_tensors(
    tensors: Mapping[str, torch.Tensor], path: str | os.PathLike[str], metadata: dict[str, str] | None = None
) -> None:
    """Writes safetensors under a temporary name and renames them when they are whole.

    Args:
        tensors: Name → tensor; no two of them may share memory.
        path: Where to. What was there before stays until the new file is whole.
        metadata: Text to write into the header.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, metadata=metadata)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
