"""Two saved models, compared tensor by tensor."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_prune.publishing.comparison import compare_folders
from tests.publishing.test_inspection import saved


def test_differences(tmp_path):
    first, second = saved(tmp_path / "a"), saved(tmp_path / "b", compress=True)
    assert compare_folders(first, second).are_equal
    tensors = load_file(first / "model.safetensors")
    weight = tensors["lm_head.weight"]
    weight[0, 0], weight[0, 1] = 0, weight[0, 1] + 1
    zero = next(i for i, value in enumerate(tensors["model.layers.0.mlp.up_proj.weight"].flatten()) if value == 0)
    tensors["model.layers.0.mlp.up_proj.weight"].view(-1)[zero] = 1
    tensors["new"] = tensors.pop("model.norm.weight")
    (tmp_path / "c").mkdir()
    save_file(tensors, tmp_path / "c" / "model.safetensors")
    change = compare_folders(first, tmp_path / "c")
    rows = {
        row.name: (row.lost, row.gained, row.moved) for row in change.tensors if row.lost or row.gained or row.moved
    }
    assert rows == {"lm_head.weight": (0, 1, 1), "model.layers.0.mlp.up_proj.weight": (1, 0, 0)}
    assert change.only == (("model.norm.weight",), ("new",))
    assert not change.are_equal
    assert "Only in the second: new" in str(change)


def test_what_is_not_a_number_in_both_has_not_moved(tmp_path):
    for name, value in (("a", float("nan")), ("b", float("nan")), ("c", 1.0)):
        (tmp_path / name).mkdir()
        save_file({"x": torch.tensor([value, 2.0])}, tmp_path / name / "model.safetensors")
    assert compare_folders(tmp_path / "a", tmp_path / "b").are_equal
    assert compare_folders(tmp_path / "a", tmp_path / "c").tensors[0].moved == 1


def test_models_of_other_shapes_are_an_error(tmp_path):
    for name, width in (("a", 4), ("b", 5)):
        (tmp_path / name).mkdir()
        save_file({"x": torch.ones(width)}, tmp_path / name / "model.safetensors")
    with pytest.raises(ValueError, match=r"'x' has shape \[4\] in .* and \[5\] in .*; only models of the same shapes"):
        compare_folders(tmp_path / "a", tmp_path / "b")


def test_several_files(tmp_path):
    folder = saved(tmp_path / "several", max_shard_size="10KB")
    assert len(list(folder.glob("model-*"))) > 1
    assert compare_folders(folder, saved(tmp_path / "one")).are_equal
