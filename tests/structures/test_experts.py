"""Experts: removed is barred, for every type of mixture, in a list or fused; and what cannot go is an error."""

import copy
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn

from hf_prune import PruningConfig, prune, shrink
from hf_prune.structures.experts import bar_pruned_, find_experts, find_mixtures
from hf_prune.structures.groups import masks_of
from hf_prune.structures.loading import recorded_in
from hf_prune.structures.shrinking import remove_
from hf_prune.weights.targets import find_targets
from tests.structures.mixtures import AVAILABLE, EXPERTS, barred_logits, build_mixture, logits_of
from tests.structures.models import build

CONFIG = PruningConfig(sparsity=0.375, granularity="expert", schedule="one_shot")


def chosen(structures, uneven):
    """Some experts of each group, which stay."""
    generator, kept = torch.Generator().manual_seed(7), {}
    for i, (name, group) in enumerate(structures.items()):
        levels = group.counts_that_may_go()
        gone = levels[min(3 - 2 * (uneven and i % 2), len(levels) - 1)]
        kept[name] = torch.ones(group.count, dtype=torch.bool)
        kept[name][torch.randperm(group.count, generator=generator)[:gone]] = False
    return kept


def found_in(model):
    return find_experts(model, find_targets(model))


@pytest.mark.parametrize("uneven", [False, True], ids=["uniform", "uneven"])
@pytest.mark.parametrize("name", AVAILABLE)
def test_removed_experts_are_barred_experts(name, uneven, monkeypatch, tmp_path):
    model = build_mixture(name)
    structures, parameters = found_in(model), model.num_parameters()
    kept = chosen(structures, uneven)
    expected = barred_logits(model, kept, monkeypatch)
    masks_of(structures, kept).apply_(model)
    bar_pruned_(model, structures)
    assert (logits_of(model) - expected).abs().max() < 1e-10  # Masked.
    remove_(model, structures, kept)
    assert model.num_parameters() < parameters
    assert (logits_of(model) - expected).abs().max() < 1e-10  # Shrunk.
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64).double().eval()
    assert (logits_of(loaded) - expected).abs().max() < 1e-10  # Loaded.
    counts = {int(each.sum()) for each in kept.values()}
    assert bool(recorded_in(model.config)) == (len(counts) > 1)
    left = found_in(loaded)
    assert {place: group.count for place, group in left.items()} == {n: int(k.sum()) for n, k in kept.items()}


def test_there_are_many_types():
    assert len(AVAILABLE) >= 20
    models = [build_mixture(name) for name in ("mixtral", "switch_transformers")]
    assert [find_mixtures(model)[0].entries is None for model in models] == [True, False]


@pytest.mark.parametrize(
    ("name", "field", "left"),
    [
        pytest.param("mixtral", "num_local_experts", 5, marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "n_routed_experts", 5, marks=pytest.mark.slow),
        pytest.param("switch_transformers", "num_experts", 5, marks=pytest.mark.slow),
    ],
)
def test_a_uniform_model_loads_where_hf_prune_is_not_imported(name, field, left, tmp_path):
    model = build_mixture(name, torch.float32)
    prune(model, PruningConfig(sparsity=0.375, granularity="expert", schedule="one_shot", uniform=True))
    masked = logits_of(model)
    shrink(model)
    assert getattr(model.config, field) == left
    model.save_pretrained(tmp_path)
    code = f"""
import sys, torch, transformers
model = transformers.{type(model).__name__}.from_pretrained({str(tmp_path)!r}).eval()
assert "hf_prune" not in sys.modules
tokens = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(5))
others = {{"decoder_input_ids": tokens[:, :5]}} if model.config.is_encoder_decoder else {{"use_cache": False}}
with torch.no_grad():
    torch.save(model(input_ids=tokens, **others).logits, {str(tmp_path / "logits")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={"OMP_NUM_THREADS": "1"})
    assert (torch.load(tmp_path / "logits") - masked).abs().max() < 1e-5


def test_masks_and_zeros_say_the_same():
    model = build_mixture("mixtral")
    prune(model, CONFIG)
    masked, copied = logits_of(model), copy.deepcopy(model)
    assert torch.equal(logits_of(copied), masked)  # A copy bars them too.
    shrink(model)
    fresh = type(copied)(copied.config).double().eval()
    fresh.load_state_dict(copied.state_dict())  # Who loads the weights has no bars, and shrinks all the same.
    assert not torch.equal(logits_of(fresh), masked)
    shrink(fresh)
    for each in (model, fresh):
        assert (logits_of(each) - masked).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text", "deepseek_v3"])
@pytest.mark.parametrize("granularity", ["neuron", "expert+neuron"])
def test_neurons_of_experts_go_as_many_of_each(name, granularity):
    model = build_mixture(name)
    width = model.model.layers[1].get_submodule("feed_forward" if "llama4" in name else "mlp").experts.down_proj.shape
    prune(model, PruningConfig(sparsity=0.5, granularity=granularity, schedule="one_shot", multiple_of=2))
    masked = logits_of(model)
    shrink(model)
    assert (logits_of(model) - masked).abs().max() < 1e-10
    down = model.model.layers[1].get_submodule("feed_forward" if "llama4" in name else "mlp").experts.down_proj
    assert down.shape != width


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("granularity", ["expert+neuron", "head+neuron+expert"])
def test_neurons_of_experts_in_a_list_are_those_of_experts_that_stay(granularity, uniform):
    model = build_mixture("switch_transformers")
    config = PruningConfig(
        sparsity=0.25, granularity=granularity, schedule="one_shot", multiple_of=2, uniform=uniform, scope="layer"
    )
    report = prune(model, config)
    masked = logits_of(model)
    shrink(model)
    assert (logits_of(model) - masked).abs().max() < 1e-10
    layer = model.encoder.block[1].layer[1].mlp
    assert len(layer.experts) == 6
    assert {expert.wi.out_features for expert in layer.experts.values()} == {18}  # Of 24.
    neurons = [row for row in report.structures if row.kind == "neuron" and ".experts." in row.name]
    assert {(row.zeros, row.total) for row in neurons} == {(6, 24)}  # Others are counted with their experts.


def test_uniform_neurons_are_said_by_the_field():
    model = build_mixture("qwen3_moe")
    config = PruningConfig(sparsity=0.5, granularity="expert+neuron", schedule="one_shot", multiple_of=2, uniform=True)
    prune(model, config)
    shrink(model)
    assert (model.config.num_experts, model.config.moe_intermediate_size) == (4, 6)
    assert not recorded_in(model.config)


def test_a_field_that_says_something_of_shared_experts_too_is_an_error():
    config = PruningConfig(sparsity=0.5, granularity="neuron", schedule="one_shot", multiple_of=2, uniform=True)
    with pytest.raises(ValueError, match=r"uniform: no config of DeepseekV3ForCausalLM can say fewer neurons"):
        prune(build_mixture("deepseek_v3", n_shared_experts=2), config)


def test_shared_experts_stay():
    model = build_mixture("qwen2_moe")
    names = {m.name for group in found_in(model).values() for m in group.members}
    assert names
    assert not any("shared" in name for name in names)


def test_fewer_experts_than_the_router_chooses_are_an_error():
    with pytest.raises(ValueError, match=r"at least 2 experts \(a router chooses so many experts for each token"):
        prune(build_mixture("mixtral"), PruningConfig(sparsity=0.9, granularity="expert", schedule="one_shot"))
    model = build_mixture("mixtral", num_experts_per_tok=EXPERTS)
    with pytest.raises(ValueError, match=r"no expert of .* can go: no place has more than the 8 that have to stay"):
        prune(model, CONFIG)
    model = build_mixture("mixtral")
    structures = found_in(model)
    kept = {name: torch.arange(EXPERTS) == 0 for name in structures}
    with pytest.raises(ValueError, match=r"1 of the 8 experts of .* are left, and at least 2 have to stay"):
        shrink(model, masks_of(structures, kept))


def test_of_each_group_as_many_stay(monkeypatch):
    model = build_mixture("deepseek_v3", n_group=2, topk_group=1)
    structures = found_in(model)
    assert {(group.runs, group.least) for group in structures.values()} == {(2, 4)}
    assert next(iter(structures.values())).counts_that_may_go() == [0, 2, 4]
    kept = {name: torch.tensor([True, False, True, True, False, True, True, True]) for name in structures}
    expected = barred_logits(model, kept, monkeypatch)
    remove_(model, structures, kept)
    assert (logits_of(model) - expected).abs().max() < 1e-10
    with pytest.raises(ValueError, match="at least 4 experts"):
        prune(
            build_mixture("deepseek_v3", n_group=2, topk_group=1),
            PruningConfig(sparsity=0.9, granularity="expert", schedule="one_shot"),
        )


def test_a_model_without_experts_is_an_error():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no experts between which a router chooses"):
        prune(build("llama"), CONFIG)
    with pytest.raises(ValueError, match="experts are those of a Transformers model, got Sequential"):
        prune(nn.Sequential(nn.Linear(8, 8)), CONFIG)


def test_a_router_that_is_not_found_is_an_error():
    model = build_mixture("mixtral")
    for layer in model.model.layers:
        del layer.mlp.gate
    with pytest.raises(ValueError, match=r"the router of the experts 'model\.layers\.0\.mlp\.experts' is not found"):
        prune(model, CONFIG)


def test_uniform_where_no_field_counts_them_is_an_error(monkeypatch):
    monkeypatch.setattr("hf_prune.structures.experts.EXPERT_COUNTS", ())
    config = PruningConfig(sparsity=0.375, granularity="expert", schedule="one_shot", uniform=True)
    with pytest.raises(ValueError, match="uniform: no config of MixtralForCausalLM can say fewer experts"):
        prune(build_mixture("mixtral"), config)


def test_routing_that_depends_on_their_number_is_an_error_before_anything_is_pruned():
    """NLLB gives each expert room for a share of the tokens."""
    model = build_mixture("nllb-moe", torch.float32, second_expert_policy="all")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match="experts cannot be removed from NllbMoeForConditionalGeneration"):
        prune(model, CONFIG)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.skipif("deepseek_v4" not in transformers.CONFIG_MAPPING, reason="a later type")
def test_experts_that_a_table_chooses_stay():
    with pytest.raises(ValueError, match=r"no expert of .* is left to prune. Experts stay if"):
        prune(build_mixture("deepseek_v4"), CONFIG)


def test_experts_of_which_a_matrix_is_no_target_stay():
    model = build_mixture("mixtral")
    config = PruningConfig(
        sparsity=0.25, granularity="expert", schedule="one_shot", exclude_modules=r"model\.layers\.0\..*down_proj"
    )
    report = prune(model, config)
    assert len(report.structures) == 1


def test_weights_of_three_axes_that_are_no_experts_stop_nothing():
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp.register_parameter("mixing", nn.Parameter(torch.ones(3, 4, 5)))
    assert find_mixtures(model) == []


def test_a_list_that_is_recorded_longer_than_it_is_is_an_error(tmp_path):
    model = build_mixture("switch_transformers", torch.float32)
    prune(model, CONFIG)
    shrink(model)
    record = dict(recorded_in(model.config))
    assert all(length < EXPERTS for length in record["lengths"].values())
    for length, message in ((0, "recorded length of .* must be a positive whole number"), (9, "of another model")):
        wrong = {**record, "lengths": dict.fromkeys(record["lengths"], length)}
        model.config.quantization_config = wrong
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            type(model).from_pretrained(tmp_path)


def test_neurons_of_experts_that_keep_theirs_are_an_error_where_nothing_else_is_known():
    with pytest.raises(ValueError, match="neurons cannot be removed from MixtralForCausalLM, as a small model"):
        prune(
            build_mixture("mixtral"),
            PruningConfig(sparsity=0.5, granularity="neuron", schedule="one_shot", exclude_modules=r".*down_proj"),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neurons_are_left_as_fused_kernels_read_them(dtype):
    """The kernels that Transformers chooses by itself read 16 bytes at a time, and fail after odd cuts."""
    model = build_mixture("mixtral", dtype, intermediate_size=48, hidden_size=32)
    prune(model, PruningConfig(sparsity=0.6, granularity="neuron", schedule="one_shot", multiple_of=1))
    shrink(model)
    widths = {layer.mlp.experts.down_proj.shape[-1] for layer in model.model.layers}
    assert all(width < 48 and width * dtype.itemsize % 16 == 0 for width in widths)
    assert model(input_ids=torch.ones(1, 8, dtype=torch.long)).logits.isfinite().all()
