"""Networks of timm: what is left alone in them, and which of their channels go. A stand-in has their shape."""

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import ImageClassifierOutput

from hf_prune import PruningConfig, PruningTrainerCallback, prune, shrink
from hf_prune.weights.targets import find_targets
from tests.structures.models import perturbed


class Standardized(nn.Conv2d):
    """A convolution with a norm over its weight, as in NFNets: it is another one with fewer inputs."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Block(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, conv = kind, Standardized if kind == "standardized" else nn.Conv2d
        self.conv1, self.bn1 = conv(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = conv(16, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        inner = self.bn1(self.conv1(x)).relu()
        if self.kind == "split":
            inner = torch.cat(inner.split([4, 12], 1)[::-1], 1)
        return (x + self.bn2(self.conv2(inner))).relu()


class Network(nn.Module):
    """As a ResNet-D of timm is: no config, and the names of its ends in a dict."""

    def __init__(self, kind, labels):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1))
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Block(kind), Block(kind))
        self.fc = nn.Linear(8, labels)
        self.pretrained_cfg = {"first_conv": "conv1.0", "classifier": "fc", "input_size": (3, 32, 32)}

    def forward(self, x):
        return self.fc(self.layer1(self.bn1(self.conv1(x)).relu()).mean((2, 3)))


class WrapperConfig(transformers.PretrainedConfig):
    model_type = "stand_in_for_timm"

    def __init__(self, kind="residual", **kwargs):
        self.kind = kind
        super().__init__(**kwargs)


class Wrapper(transformers.PreTrainedModel):
    """As TimmWrapperForImageClassification is."""

    config_class, base_model_prefix, main_input_name = WrapperConfig, "timm_model", "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.timm_model = Network(config.kind, config.num_labels)
        self.post_init()

    def forward(self, pixel_values, labels=None):
        logits = self.timm_model(pixel_values)
        return ImageClassifierOutput(None if labels is None else F.cross_entropy(logits, labels), logits)


def build(kind="residual"):
    torch.manual_seed(0)
    return perturbed(Wrapper(WrapperConfig(kind, num_labels=3)))


def images(size=2, side=32):
    return torch.randn(size, 3, side, side, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_of(model):
    return model.eval()(images()).logits


CONFIG = PruningConfig(sparsity=0.5, granularity="channel", multiple_of=2, schedule="one_shot")


@pytest.mark.parametrize(
    ("ends", "left"),
    [
        ({"first_conv": "conv1.0", "classifier": "fc"}, {"conv1.0", "conv1.3", "fc"}),
        ({"first_conv": ("conv1.0", "layer1.0.conv1"), "classifier": None}, {"conv1.0", "conv1.3", "layer1.0.conv1"}),
        (
            {"first_conv": "layer1.0.conv1", "classifier": ("fc", "conv1")},
            {"layer1.0.conv1", "conv1.0", "conv1.3", "fc"},
        ),
        ({"first_conv": "", "classifier": ()}, set()),
    ],
)
def test_ends_that_timm_names_are_left_alone(ends, left):
    model = build()
    everything = set(find_targets(model, ".*"))
    for inside in (model, nn.ModuleDict({"backbone": model.timm_model})):
        model.timm_model.pretrained_cfg = ends
        prefix = "timm_model." if inside is model else "backbone."
        found = {name.removeprefix(prefix) for name in find_targets(inside)}
        assert found == {name.removeprefix("timm_model.") for name in everything} - {f"{name}.weight" for name in left}


def test_of_a_vgg_only_the_first_convolution_is_left_alone():
    model = nn.ModuleDict({"features": nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))})
    model.pretrained_cfg = {"first_conv": "features.0", "classifier": "head.fc"}
    assert list(find_targets(model)) == ["features.2.weight"]


def test_features_alone_have_underscores_in_their_names():
    model = nn.ModuleDict({"features_conv0": nn.Conv2d(3, 4, 3), "features_conv1": nn.Conv2d(4, 4, 3)})
    model.default_cfg = {"first_conv": "features.conv0"}
    assert list(find_targets(model)) == ["features_conv1.weight"]


def test_channels_go_and_the_smaller_network_is_loaded(tmp_path):
    model = build()
    before = model.num_parameters()
    assert prune(model, CONFIG).sparsity == 0.5
    masked = logits_of(model)
    shrink(model).save_pretrained(tmp_path)
    assert model.num_parameters() < before
    assert (logits_of(model) - masked).abs().max() < 1e-5
    assert torch.equal(logits_of(Wrapper.from_pretrained(tmp_path)), logits_of(model))


def test_channels_go_in_training(make_trainer):
    model = build()
    data = [{"pixel_values": image, "labels": torch.tensor(i % 3)} for i, image in enumerate(images(8))]
    make_trainer(model, PruningTrainerCallback(CONFIG), train_dataset=data, max_steps=2).train()
    assert model.timm_model.layer1[0].conv1.out_channels + model.timm_model.layer1[1].conv1.out_channels == 16


@pytest.mark.parametrize(
    ("kind", "why"), [("split", r"can no longer be called \(.*split"), ("standardized", "relative difference of log")]
)
def test_networks_that_count_on_their_widths_are_left_whole(kind, why):
    model = build(kind)
    before = logits_of(model)
    message = rf"channels cannot be removed from Wrapper: a copy without half of them fails.*{why}.*Choose granularity"
    with pytest.raises(ValueError, match=message):
        prune(model, CONFIG)
    assert torch.equal(logits_of(model), before)
    assert prune(model, PruningConfig(sparsity=0.5)).sparsity == 0.5


@pytest.mark.parametrize("architecture", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_timm_itself(architecture, tmp_path):
    pytest.importorskip("timm")
    torch.manual_seed(0)
    config = transformers.TimmWrapperConfig(architecture=architecture, num_labels=3)
    model = perturbed(transformers.TimmWrapperForImageClassification(config))
    ends = {name for name, _ in model.named_parameters()} - set(find_targets(model))
    assert any("stem" in name or "conv1.0" in name for name in ends)
    assert any("fc" in name or "classifier" in name for name in ends)
    prune(model, CONFIG)
    masked = logits_of(model)
    shrink(model).save_pretrained(tmp_path)
    assert (logits_of(model) - masked).abs().max() < 1e-4
    again = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits_of(again), logits_of(model))
