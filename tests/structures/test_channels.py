"""Channels of convolutional networks."""

import builtins
import copy

import pytest
import torch
import transformers
from torch import nn

from hf_prune import PruningConfig, PruningTrainerCallback, prune, save_pretrained, shrink
from hf_prune.structures.channels import find_channels
from hf_prune.structures.groups import kept_in, nonzeros
from hf_prune.structures.shrinking import find_removable
from hf_prune.weights.targets import find_targets
from tests.structures.models import logits_of, perturbed
from tests.structures.test_loading import load_elsewhere, save
from tests.structures.test_training import samples, without_dropout
from tests.tiny import COMPARES_SHAPES

IMAGES = {"num_channels": 1, "num_labels": 3}
NETWORKS = {
    "hgnet, which puts channels side by side": lambda: transformers.HGNetV2ForImageClassification(
        transformers.HGNetV2Config(
            embedding_size=16,
            hidden_sizes=[32, 64],
            depths=[1, 1],
            stem_channels=[1, 8, 16],
            stage_in_channels=[16, 32],
            stage_mid_channels=[8, 8],
            stage_out_channels=[32, 64],
            stage_num_blocks=[1, 1],
            stage_downsample=[False, True],
            stage_light_block=[False, False],
            stage_kernel_size=[3, 3],
            stage_numb_of_layers=[2, 2],
            **IMAGES,
        )
    ),
    "resnet": lambda: transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16, 24], depths=[2, 2, 1], layer_type="basic", **IMAGES
        )
    ),
    "resnet with bottlenecks": lambda: transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[32, 48], depths=[2, 2], **IMAGES)
    ),
    "efficientnet": lambda: transformers.EfficientNetForImageClassification(
        transformers.EfficientNetConfig(
            image_size=32,
            width_coefficient=0.25,
            depth_coefficient=0.2,
            hidden_dim=320,
            dropout_rate=0.0,
            drop_connect_rate=0.0,
            **IMAGES,
        )
    ),
    "convnext": lambda: transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[2, 2], num_stages=2, patch_size=2, **IMAGES)
    ),
}


def build(name, dtype=torch.float32):
    torch.manual_seed(0)
    model = perturbed(NETWORKS[name]()).to(dtype)
    with torch.no_grad():  # No running statistics of a network that has seen nothing.
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return model


def config_of(scope="global", sparsity=0.5, **fields):
    return PruningConfig(
        sparsity=sparsity, schedule="one_shot", granularity="channel", scope=scope, multiple_of=2, **fields
    )


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_masked_and_shrunk_networks_give_the_same_outputs(name, scope, dtype, bound):
    model = build(name, dtype)
    dense, parameters = logits_of(model), model.num_parameters()
    report = prune(model, config_of(scope))
    assert report.sparsity == pytest.approx(0.5, abs=0.1)
    masked = logits_of(model)
    assert not torch.equal(masked, dense)
    shrink(model)
    assert model.num_parameters() < 0.8 * parameters
    assert (logits_of(model) - masked).abs().max() < bound


@pytest.mark.parametrize("name", NETWORKS)
def test_planted_channels_are_the_ones_that_go(name):
    model = build(name)
    generator = torch.Generator().manual_seed(3)
    channels = find_channels(model, find_targets(model), multiple_of=2)
    planted, total = {}, sum(those.count for those in channels.values())
    with torch.no_grad():
        for place, those in channels.items():
            gone = torch.randperm(those.count, generator=generator)[: those.count // 4 * 2].sort().values
            planted[place] = gone.tolist()
            keep = torch.ones(those.count).index_fill_(0, gone, 1e-4)
            for member in those.members:
                factor = torch.cat([torch.ones(1), keep])[member.owners + 1]
                member.parameter.mul_(member.along_axes(factor))
    prune(model, config_of(sparsity=sum(map(len, planted.values())) / total))
    kept = kept_in(channels, nonzeros(channels))
    assert {place: (~each).nonzero().flatten().tolist() for place, each in kept.items()} == planted


@pytest.mark.slow
def test_every_network_loads_in_a_fresh_process_to_the_last_bit(tmp_path):
    expected = {}
    for name in NETWORKS:
        model = build(name)
        prune(model, config_of())
        folder = tmp_path / name
        expected[folder] = save(shrink(model), folder)
    load_elsewhere(tmp_path, plain=False)
    for folder, logits in expected.items():
        assert torch.equal(torch.load(folder / "logits.pt"), logits), folder.name


@pytest.mark.parametrize(("name", "compress"), [("resnet", False), ("resnet", True), ("efficientnet", True)])
def test_a_shrunk_network_gets_a_head_of_other_labels(name, compress, tmp_path):
    """Of the head's weight, only how many channels it reads is recorded."""
    model = build(name)
    prune(model, config_of())
    save_pretrained(shrink(model), tmp_path / "three", compress=compress)
    kind = type(model)
    with pytest.raises((RuntimeError, ValueError), match="ignore_mismatched_sizes"):
        kind.from_pretrained(tmp_path / "three", num_labels=5)
    if not COMPARES_SHAPES:
        return
    loaded = kind.from_pretrained(tmp_path / "three", num_labels=5, ignore_mismatched_sizes=True)
    for ours, theirs in zip(loaded.base_model.parameters(), model.base_model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert logits_of(loaded.eval()).shape[1] == 5
    loaded.save_pretrained(tmp_path / "five")
    again = kind.from_pretrained(tmp_path / "five")
    assert torch.equal(logits_of(again), logits_of(loaded))
    assert logits_of(kind.from_pretrained(tmp_path / "three")).shape[1] == 3


def test_of_a_resnet_go_the_inner_channels_and_those_of_stages():
    """Those of the first stage are also the embedding's, which is no target."""
    model = build("resnet")
    found = find_channels(model, find_targets(model), multiple_of=1)
    assert sorted(those.count for those in found.values()) == [8, 8, 16, 16, 16, 24, 24]
    everything = find_channels(model, find_targets(model, ".*"), multiple_of=1)
    assert sorted(those.count for those in everything.values()) == [8, 8, 8, 16, 16, 16, 24, 24]


def test_of_a_convnext_go_the_inner_channels_alone():
    model = build("convnext")
    found = find_channels(model, find_targets(model), multiple_of=1)
    assert sorted(those.count for those in found.values()) == [32, 32, 64, 64]
    assert all(name.endswith("pwconv1") for name in found)


def test_the_network_is_left_as_it_was():
    model = build("resnet").train()
    before = copy.deepcopy(model.state_dict())
    find_channels(model, find_targets(model), multiple_of=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_it_is_pruned_again():
    model = build("resnet")
    prune(model, config_of())
    shrink(model)
    before = model.num_parameters()
    prune(model, config_of(sparsity=0.3))
    masked = logits_of(model)
    shrink(model)
    assert model.num_parameters() < before
    assert (logits_of(model) - masked).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["resnet", "efficientnet"])
def test_channels_are_held_while_training_and_removed_at_the_end(name, make_trainer):
    model = without_dropout(build(name))
    before = model.num_parameters()
    config = PruningConfig(sparsity=0.5, schedule="constant", rounds=2, granularity="channel", multiple_of=2)
    trainer = make_trainer(model, PruningTrainerCallback(config), train_dataset=samples(model))
    trainer.train()
    assert model.num_parameters() < before
    assert logits_of(model.eval()).isfinite().all()


def test_training_under_masks_is_training_what_is_left(make_trainer):
    model = without_dropout(build("resnet", torch.float64))
    small = copy.deepcopy(model)
    prune(small, config_of())
    shrink(small)
    options = {"optim": "adamw_torch", "max_grad_norm": 0.5, "weight_decay": 0.1}
    make_trainer(model, PruningTrainerCallback(config_of()), train_dataset=samples(model), **options).train()
    make_trainer(small, train_dataset=samples(small), **options).train()
    for (n, ours), theirs in zip(model.named_parameters(), small.parameters(), strict=True):
        assert (ours - theirs).abs().max() < 1e-9, n


# Bad input


def test_torch_pruning_is_not_installed(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("torch_pruning"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "hf_prune\[cnn\]"'):
        prune(build("resnet"), config_of())


def test_channels_of_a_transformer():
    from tests.structures.models import build as build_transformer

    with pytest.raises(ValueError, match=r"ViTForImageClassification is no convolutional network of images"):
        prune(build_transformer("vit"), config_of())


@pytest.mark.parametrize("granularity", ["head", "neuron", "layer"])
def test_heads_of_a_convolutional_network(granularity):
    with pytest.raises(ValueError, match=f"has no {granularity}s that are known. Choose granularity channel"):
        prune(build("resnet"), PruningConfig(sparsity=0.5, granularity=granularity))


def test_nothing_can_be_removed():
    """The library would prune nothing, and say nothing."""
    with pytest.raises(ValueError, match="no channel of ConvNextForImageClassification can be removed"):
        prune(build("convnext"), config_of(target_modules=["dwconv"]))


def test_nothing_was_pruned():
    with pytest.raises(ValueError, match="there is nothing to remove"):
        shrink(build("resnet"))


def test_all_that_a_user_excludes_is_left_alone():
    model = build("resnet")
    before = len(find_removable(model))
    report = prune(model, config_of(exclude_modules=[".*stages.1.*"]))
    assert 0 < len(report.structures) < before
    assert not any("stages.1" in row.name for row in report.structures)


def test_what_ends_in_no_output_is_an_error():
    model = transformers.MobileNetV2ForSemanticSegmentation(
        transformers.MobileNetV2Config(image_size=32, depth_multiplier=0.25, num_labels=3)
    )
    with pytest.raises(ValueError, match=r"'mobilenet_v2\.conv_1x1.*' computes what is in none of its outputs"):
        prune(model, config_of())
