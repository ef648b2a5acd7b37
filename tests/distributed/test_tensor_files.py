import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hf_prune.distributed.shards import own
from hf_prune.distributed.tensor_files import Layout, Tensors, save_tensors
from tests.processes import on_processes

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip


def save(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    layout = {name: Layout(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    save_tensors(layout, tensors.__getitem__, path, metadata)


def test_tensors_come_back_with_their_metadata(tmp_path):
    tensors = {"a": torch.randn(3, 4).t(), "b": torch.tensor(7), "c": torch.randn(5).bfloat16(), "d": torch.ones(0, 2)}
    save(tensors, tmp_path / "file", {"format": "x"})
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == {"format": "x"}


VIEWS = {
    "one of five": lambda: torch.arange(5.0)[::5],
    "one of a matrix": lambda: torch.arange(64.0).view(8, 8)[::8, 8 - 1 :: 8],
    "a column": lambda: torch.arange(28.0).view(4, 7)[:, ::7],
    "a row": lambda: torch.arange(18.0).view(3, 6)[1:2, ::3],
    "permuted": lambda: torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1),
    "expanded": lambda: torch.arange(6.0).view(6, 1).expand(6, 4),
    "no rows": lambda: torch.ones(0, 3),
    "no columns": lambda: torch.ones(3, 0),
    "no dimensions": lambda: torch.arange(3.0)[2],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("view", VIEWS)
def test_views_are_written_and_known_as_what_they_show(view, dtype, tmp_path):
    tensor = VIEWS[view]().to(dtype) if dtype != torch.float32 else VIEWS[view]()
    Tensors({"a": tensor}).save(tmp_path / "file")
    found = Tensors.load(tmp_path / "file")
    assert torch.equal(found.tensors["a"], tensor)
    assert found.digest() == Tensors({"a": tensor}).digest() == Tensors({"a": tensor.clone()}).digest()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_what_safetensors_write(dtype, tmp_path):
    """Each dtype beside a narrower and a wider one, whose sizes leave nothing aligned by itself."""
    values = torch.randint(0, 2, (3, 5))
    tensors = {
        "b": values.to(dtype, copy=True),
        "a": values.bool(),
        "c": values[0].double(),
        "é": values.to(dtype, copy=True)[:1],
    }
    save(tensors, tmp_path / "ours", {"format": "pt"})
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    ours, theirs = (load_file(tmp_path / name) for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8))


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    made: list[weakref.ref[torch.Tensor]] = []

    def make(name: str) -> torch.Tensor:
        assert [ref() for ref in made] == [None] * len(made)
        tensor = torch.full((1000,), float(name))
        made.append(weakref.ref(tensor))
        return tensor

    layout = {str(i): Layout(torch.float32, (1000,)) for i in range(5)}
    save_tensors(layout, make, tmp_path / "file")
    assert len(made) == 5
    assert all(
        torch.equal(tensor, torch.full((1000,), float(name))) for name, tensor in load_file(tmp_path / "file").items()
    )


def fail(*_: object) -> None:
    raise OSError("no space left on device")


@pytest.mark.parametrize("when", ["writing", "renaming"])
def test_a_file_that_cannot_be_saved_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch, when):
    save({"a": torch.ones(9), "b": torch.ones(9)}, tmp_path / "file")
    tensors: dict[str, Callable[[], torch.Tensor | None]] = {"a": lambda: torch.zeros(9), "b": lambda: torch.zeros(9)}
    if when == "writing":
        tensors["b"] = fail
    else:
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left on device"):
        save_tensors(
            dict.fromkeys(tensors, Layout(torch.float32, (9,))), lambda name: tensors[name](), tmp_path / "file"
        )
    monkeypatch.undo()
    assert torch.equal(load_file(tmp_path / "file")["a"], torch.ones(9))
    assert os.listdir(tmp_path) == ["file"]


def tensors_of(size: int) -> Tensors:
    """Those of which each of so many processes holds rows, and one that is whole; the last process has none of `b`."""
    mesh = init_device_mesh("cpu", (size,))
    like = {
        name: distribute_tensor(torch.arange(rows * 6.0).view(rows, 2, 3), mesh, [Shard(0)])
        for name, rows in (("a", 7), ("b", 2))
    }
    return Tensors({**{name: own(tensor) for name, tensor in like.items()}, "c": torch.ones(3)}, like, {"x": "y"})


def there_and_back(rank: int, folder: Path) -> list[str]:
    tensors = tensors_of(3)
    tensors.save(folder / "rows", write=rank == 0)
    torch.distributed.barrier()
    loaded = Tensors.load(folder / "rows", {**tensors.like, "not in the file": tensors.like["a"]})
    assert loaded.like.keys() == {"a", "b"}
    assert loaded.metadata == {"x": "y"}
    assert [len(loaded.tensors["a"]), len(loaded.tensors["b"])] == [[3, 1], [3, 1], [1, 0]][rank]
    for name, tensor in tensors.tensors.items():
        assert torch.equal(loaded.tensors[name], tensor)
    other: dict[str, DTensor] = {"a": distribute_tensor(torch.ones(6, 7), init_device_mesh("cpu", (3,)), [Shard(0)])}
    with pytest.raises(ValueError, match=r"has 'a' of shape \[7, 2, 3\], the model \[6, 7\]"):
        Tensors.load(folder / "rows", other)
    return [tensors.digest(), loaded.digest()]


@pytest.mark.multiprocess
def test_each_process_reads_its_rows_of_what_one_has_written(tmp_path):
    found = on_processes(3, there_and_back, tmp_path, tmp_path)
    whole = Tensors.load(tmp_path / "rows")
    assert torch.equal(whole.tensors["a"], torch.arange(42.0).view(7, 2, 3))
    assert [list(digests) for digests in found] == [[whole.digest()] * 2] * 3
