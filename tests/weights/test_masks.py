import json
import os
import pickle
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import ViTConfig, ViTModel

from hf_prune.distributed.digests import digest_of, digests_of
from hf_prune.weights.masks import MaskSet, mask_, masked_in
from hf_prune.weights.targets import find_targets


def bits(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def odd_masks():
    return MaskSet(
        {
            "empty": bits(0),
            "empty.2d": bits(0, 3),
            "scalar": torch.tensor(True),
            "one": torch.tensor([False]),
            "seven": bits(7),
            "eight": bits(8),
            "nine": bits(3, 3),
            "experts": bits(3, 5, 7),
            "conv.weight": bits(4, 3, 3, 3),
            "transposed": bits(6, 11).t(),
            "strided": bits(10, 10)[::3, 1::2],
            "ünï.¢ode": bits(2, 2),
        }
    )


def equal(one, other):
    return list(one) == list(other) and all(torch.equal(one[n], other[n]) for n in one)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


# The mapping


def test_a_mask_set_is_a_mapping_in_the_order_given():
    first, second = bits(2, 3), bits(4, seed=1)
    masks = MaskSet({"b": first, "a": second})
    assert isinstance(masks, Mapping)
    assert list(masks) == list(masks.keys()) == ["b", "a"]
    assert masks["b"] is first
    assert masks.get("c") is None
    assert "a" in masks
    assert "c" not in masks
    assert len(masks) == 2
    assert dict(masks.items())["a"] is second
    with pytest.raises(KeyError, match="c"):
        masks["c"]


def test_a_mask_set_cannot_be_written_to():
    masks = MaskSet({"a": bits(2)})
    with pytest.raises(TypeError, match="item assignment"):
        masks["b"] = bits(2)
    given = {"a": bits(2)}
    masks = MaskSet(given)
    given["b"] = bits(2)
    assert list(masks) == ["a"]


def test_mask_sets_with_equal_masks_are_equal():
    masks = odd_masks()
    assert masks == MaskSet({name: mask.clone() for name, mask in masks.items()})
    assert masks == MaskSet({name: masks[name].clone() for name in sorted(masks)})
    assert masks != MaskSet({**masks, "nine": ~masks["nine"]})
    assert masks != MaskSet({**masks, "nine": masks["nine"].flatten()})
    assert masks != MaskSet({name: masks[name] for name in list(masks)[1:]})
    assert MaskSet() == MaskSet()
    assert masks != 3


def test_sparsity_is_counted_over_all_masks():
    masks = MaskSet({"a": torch.tensor([True, False, False, False]), "b": torch.ones(2, 3, dtype=torch.bool)})
    assert (masks.total, masks.masked, masks.sparsity) == (10, 3, 0.3)
    assert repr(masks) == "MaskSet(2 masks, 10 weights, sparsity 0.3000)"
    assert masked_in(masks["a"]) == 3


def test_no_mask_prunes_nothing():
    assert (MaskSet().total, MaskSet().masked, MaskSet().sparsity) == (0, 0, 0.0)
    assert not MaskSet()
    assert MaskSet({"empty": bits(0, 3)}).sparsity == 0.0
    assert repr(MaskSet()) == "MaskSet(0 masks, 0 weights, sparsity 0.0000)"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64])
def test_a_mask_has_to_be_bool(dtype):
    with pytest.raises(
        TypeError, match=rf"the mask of 'layer\.weight' must be a bool tensor \(True = kept\), got {dtype}"
    ):
        MaskSet({"fine": bits(2), "layer.weight": torch.ones(2, dtype=dtype)})


@pytest.mark.parametrize("mask", [[True, False], None, True, bits(3).numpy()], ids=["list", "None", "bool", "numpy"])
def test_a_mask_has_to_be_a_tensor(mask):
    with pytest.raises(TypeError, match=r"the mask of 'layer\.weight' must be a bool tensor \(True = kept\), got "):
        MaskSet({"layer.weight": mask})


def test_a_mask_set_can_be_pickled():
    masks = odd_masks()
    assert equal(pickle.loads(pickle.dumps(masks)), masks)


# On a model


def test_apply_zeroes_the_masked_weights_and_nothing_else():
    net = model()
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    identities = {name: id(parameter) for name, parameter in net.named_parameters()}
    masks = MaskSet({"0.weight": bits(3, 4), "2.bias": torch.tensor([False, True])})
    masks.apply_(net)
    for name, parameter in net.named_parameters():
        mask = masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter, torch.where(mask, before[name], 0.0))
    assert {name: id(parameter) for name, parameter in net.named_parameters()} == identities
    assert list(net.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize(
    ("shape", "transposed"),
    [((), False), ((0, 3), False), ((2**18 + 1,), False), ((3, 2**18 - 1), False), ((1001, 789), True)],
)
def test_a_tensor_of_any_size_and_layout_is_multiplied(shape, transposed):
    tensor, mask = torch.randn(shape), bits(*shape)
    if transposed:
        tensor = tensor.t()
        mask = mask.t().contiguous()
    expected = tensor.masked_fill(~mask, 0)
    mask_(tensor, mask)
    assert torch.equal(tensor, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_apply_keeps_the_dtype_and_what_a_parameter_is_for_training(dtype):
    net = model().to(dtype)
    net[0].weight.requires_grad_(False)
    MaskSet({"0.weight": bits(3, 4), "2.weight": bits(2, 3)}).apply_(net)
    assert net[0].weight.dtype == net[2].weight.dtype == dtype
    assert (net[0].weight.requires_grad, net[2].weight.requires_grad) == (False, True)
    assert net[2].weight.grad_fn is None
    assert net[2].weight.is_leaf


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("3.weight", (2, 3), r"the model has no parameter '3\.weight'; the masks are of another model\."),
        ("2", (2, 3), r"the model has no parameter '2'; the masks are of another model\."),
        ("2.running_mean", (2,), r"the model has no parameter '2\.running_mean'"),
        ("", (2,), r"the model has no parameter ''"),
        (
            "2.weight",
            (3, 2),
            r"the mask of '2\.weight' has shape \(3, 2\), the parameter \(2, 3\); the masks are of another model\.",
        ),
        ("2.weight", (6,), r"the mask of '2\.weight' has shape \(6,\), the parameter \(2, 3\)"),
        ("2.weight", (1, 3), r"the mask of '2\.weight' has shape \(1, 3\)"),
    ],
)
def test_masks_of_another_model_are_an_error_and_change_nothing(name, shape, message):
    net = model()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    masks = MaskSet({"0.weight": torch.zeros(3, 4, dtype=torch.bool), name: torch.zeros(shape, dtype=torch.bool)})
    with pytest.raises(ValueError, match=message):
        masks.apply_(net)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_from_zeros_reads_the_zeros_of_the_named_parameters():
    net = model()
    net[0].weight.data[1, 2] = 0.0
    net[0].weight.data[2, 0] = -0.0
    masks = MaskSet.from_zeros(net, ["0.weight", "2.bias"])
    expected = torch.ones(3, 4, dtype=torch.bool)
    expected[1, 2] = expected[2, 0] = False
    assert list(masks) == ["0.weight", "2.bias"]
    assert torch.equal(masks["0.weight"], expected)
    assert torch.all(masks["2.bias"])


def test_from_zeros_by_default_reads_the_default_targets():
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=4, patch_size=2
    )
    vit = ViTModel(config)
    masks = MaskSet.from_zeros(vit)
    assert list(masks) == list(find_targets(vit))
    assert masks.masked == 0


def test_from_zeros_gives_back_what_apply_wrote():
    net = model()
    masks = MaskSet({"0.weight": bits(3, 4), "2.weight": bits(2, 3)})
    masks.apply_(net)
    assert equal(MaskSet.from_zeros(net, masks), masks)


# On disk


def test_masks_come_back_from_disk(tmp_path):
    masks = odd_masks()
    masks.save(tmp_path / "masks.safetensors")
    loaded = MaskSet.load(tmp_path / "masks.safetensors")
    assert equal(loaded, masks)
    assert all(mask.dtype == torch.bool for mask in loaded.values())
    assert os.listdir(tmp_path) == ["masks.safetensors"]


def test_masks_that_were_loaded_can_be_changed(tmp_path):
    MaskSet({"a": bits(9)}).save(tmp_path / "masks")
    loaded = MaskSet.load(str(tmp_path / "masks"))
    loaded["a"].fill_(False)
    assert loaded.sparsity == 1.0


def test_an_empty_mask_set_comes_back_from_disk(tmp_path):
    MaskSet().save(tmp_path / "masks")
    assert len(MaskSet.load(tmp_path / "masks")) == 0


@pytest.mark.parametrize("bit", range(9))
def test_each_bit_comes_back_in_its_place(tmp_path, bit):
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask.view(-1)[bit] = True
    MaskSet({"a": mask}).save(tmp_path / "masks")
    assert torch.equal(MaskSet.load(tmp_path / "masks")["a"], mask)


def test_a_weight_costs_a_bit_on_disk(tmp_path):
    MaskSet({"a": bits(1000, 1000), "b": bits(9)}).save(tmp_path / "masks")
    size = (tmp_path / "masks").stat().st_size
    assert 125_009 <= size < 125_009 + 500  # Rows are filled up to whole bytes.


def test_saving_again_replaces_the_masks(tmp_path):
    path = tmp_path / "masks"
    MaskSet({"a": bits(1000)}).save(path)
    MaskSet({"b": bits(3)}).save(path)
    assert list(MaskSet.load(path)) == ["b"]
    assert os.listdir(tmp_path) == ["masks"]


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no masks at .*missing"):
        MaskSet.load(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="no masks at"):
        MaskSet.load(tmp_path)


DAMAGED = "is truncated or not a file of masks"


def test_a_file_cut_off_anywhere_is_an_error(tmp_path):
    odd_masks().save(tmp_path / "masks")
    whole = (tmp_path / "masks").read_bytes()
    for length in [*range(0, 40), len(whole) // 2, *range(len(whole) - 40, len(whole))]:
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=DAMAGED):
            MaskSet.load(tmp_path / "cut")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 200, b"not safetensors " * 50, b"\x00" * 64])
def test_a_file_of_something_else_is_an_error(tmp_path, content):
    (tmp_path / "masks").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path / 'masks'} {DAMAGED}"):
        MaskSet.load(tmp_path / "masks")


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"format": "pt", "shapes": '{"a": [2]}'}])
def test_safetensors_of_something_else_are_an_error(tmp_path, metadata):
    save_file({"a": torch.zeros(1, dtype=torch.uint8)}, tmp_path / "masks", metadata=metadata)
    with pytest.raises(ValueError, match=DAMAGED):
        MaskSet.load(tmp_path / "masks")


@pytest.mark.parametrize(
    "shapes", ["", "{", "3", "[]", "null", '{"b": [8]}', '{"a": 8}', '{"a": "8"}', '{"a": [8.5]}']
)
def test_a_header_that_makes_no_sense_is_an_error(tmp_path, shapes):
    save_file(
        {"a": torch.zeros(1, dtype=torch.uint8)},
        tmp_path / "masks",
        metadata={"format": "hf_prune.masks", "shapes": shapes},
    )
    with pytest.raises(ValueError, match=DAMAGED):
        MaskSet.load(tmp_path / "masks")


@pytest.mark.parametrize("shape", [[17], [1], [8], [4, 5], [-1], [-9, -1], []])
def test_a_header_that_does_not_fit_the_bits_is_an_error(tmp_path, shape):
    """Else the bits that are not there would read as weights that are pruned."""
    MaskSet({"a": bits(9)}).save(tmp_path / "masks")
    with safe_open(tmp_path / "masks", framework="pt") as file:
        metadata, packed = file.metadata(), file.get_tensor("a")
    save_file({"a": packed}, tmp_path / "masks", metadata={**metadata, "shapes": json.dumps({"a": shape})})
    with pytest.raises(ValueError, match=DAMAGED):
        MaskSet.load(tmp_path / "masks")


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_a_file_of_another_dtype_is_an_error(tmp_path, dtype):
    metadata = {"format": "hf_prune.masks", "shapes": '{"a": [9]}'}
    save_file({"a": torch.zeros(2, dtype=dtype)}, tmp_path / "masks", metadata=metadata)
    with pytest.raises(ValueError, match=DAMAGED):
        MaskSet.load(tmp_path / "masks")


# The digest


def test_the_digest_is_that_of_equal_masks(tmp_path):
    masks = odd_masks()
    assert masks.digest() == masks.digest()
    assert len(masks.digest()) == 64
    masks.save(tmp_path / "masks")
    assert MaskSet.load(tmp_path / "masks").digest() == masks.digest()
    assert MaskSet({name: mask.clone().contiguous() for name, mask in masks.items()}).digest() == masks.digest()
    assert MaskSet({name: masks[name] for name in reversed(list(masks))}).digest() == masks.digest()


def test_the_digest_does_not_change_from_version_to_version():
    """It is on record in checkpoints: names in order, each with its shape and its rows, bits from the highest down."""

    masks = MaskSet({"b.weight": torch.tensor([[True, False, True]]), "a.weight": torch.tensor([False] * 8 + [True])})
    packed = {
        "a.weight": np.array([[0x00]] * 8 + [[0x80]], dtype=np.uint8),
        "b.weight": np.array([[0xA0]], dtype=np.uint8),
    }
    described = {"a.weight": ["a.weight", [9]], "b.weight": ["b.weight", [1, 3]]}
    expected = digests_of(packed.__getitem__, described, {})
    assert masks.digests() == expected
    assert masks.digest() == digest_of(expected)


def test_the_digest_differs_for_each_bit():
    masks = {"a": bits(3, 3), "b": bits(2, 2, 2)}
    digests = {MaskSet(masks).digest()}
    for name, mask in masks.items():
        for bit in range(mask.numel()):
            flipped = mask.clone()
            flipped.view(-1)[bit] ^= True
            digests.add(MaskSet({**masks, name: flipped}).digest())
    assert len(digests) == 1 + 9 + 8


def test_the_digest_differs_for_names_and_shapes():
    mask, other = torch.zeros(2, 8, dtype=torch.bool), torch.zeros(2, 8, dtype=torch.bool)
    mask[0, 3] = True
    variants = [
        {},
        {"a": mask},
        {"b": mask},
        {"a": mask.view(4, 4)},
        {"a": mask.view(8, 2)},
        {"a": mask.view(16)},
        {"a": mask.view(1, 16)},
        {"a": mask.view(16)[:15]},
        {"a": mask, "b": other},
        {"a": other, "b": mask},
        {"a": mask[:1], "b": mask[1:]},
        {"a": mask, "b": bits(0)},
        {"a": mask, "b": bits(0, 3)},
    ]
    assert len({MaskSet(variant).digest() for variant in variants}) == len(variants)
