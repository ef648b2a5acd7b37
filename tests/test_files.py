import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hf_prune import files
from hf_prune.files import save_tensors


def test_tensors_come_back_with_their_metadata(tmp_path):
    tensors = {"a": torch.randn(3, 4).t(), "b": torch.tensor(7), "c": torch.randn(5).bfloat16()}
    save_tensors(tensors, tmp_path / "file", {"format": "x"})
    found = load_file(tmp_path / "file")
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == {"format": "x"}


@pytest.mark.parametrize("when", ["writing", "renaming"])
def test_a_file_that_cannot_be_saved_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch, when):
    save_tensors({"a": torch.ones(9)}, tmp_path / "file")

    def fail_after_half(tensors, filename, metadata=None):
        with open(filename, "wb") as file:
            file.write(b"half a file")
        raise OSError("no space left on device")

    def fail(source, destination):
        raise OSError("no space left on device")

    if when == "writing":
        monkeypatch.setattr(files, "save_file", fail_after_half)
    else:
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left on device"):
        save_tensors({"a": torch.zeros(9)}, tmp_path / "file")
    monkeypatch.undo()
    assert torch.equal(load_file(tmp_path / "file")["a"], torch.ones(9))
    assert os.listdir(tmp_path) == ["file"]
