"""Criteria of whole structures, and what they are told, against plain loops."""

import itertools

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import default_data_collator

from hf_prune import PruningConfig, prune
from hf_prune.calibration.statistics import calibrate
from hf_prune.criteria import needs
from hf_prune.plan import Plan
from hf_prune.structures.criteria import STRUCTURE_CRITERIA, StructureInputs
from hf_prune.structures.statistics import STRUCTURE_STATISTICS, BlockInfluence
from hf_prune.weights.masks import MaskSet
from tests.structures.models import build, inputs_of
from tests.structures.test_training import samples

CONFIG = PruningConfig(sparsity=1 / 3, granularity="layer", criterion="block_influence", schedule="one_shot")


def influence_of(model, structures, batches):
    found = calibrate(
        model, {}, batches, (), 100, others={"block_influence": lambda: BlockInfluence(model, structures, {})}
    )
    return found["block_influence"]


def by_a_loop(model, batch, name, keep):
    """The mean over the tokens to keep, by the hidden states that the model itself gives."""
    with torch.no_grad():
        states = []
        layers = model.get_submodule(name)
        hooks = [layers[0].register_forward_pre_hook(lambda _, args, kwargs: states.append(args[0]), with_kwargs=True)]
        hooks += [layer.register_forward_hook(lambda _, args, out: states.append(out)) for layer in layers]
        model(**batch)
    for hook in hooks:
        hook.remove()
    states = [each[0] if isinstance(each, tuple) else each for each in states]
    found = []
    for before, after in itertools.pairwise(states):
        values = []
        for s, t in keep.nonzero().tolist():
            x, y = before[s, t].double(), after[s, t].double()
            values.append(1 - float((x * y).sum() / (x.norm() * y.norm())))
        found.append(sum(values) / len(values))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "vit", "t5", "whisper"])
@pytest.mark.parametrize("padded", [False, True])
def test_block_influence_is_what_a_loop_over_tokens_gives(name, padded):
    model = build(name)
    batch, structures = inputs_of(model), Plan.of(model, CONFIG).structures
    if padded and name in ("llama", "gpt2", "opt"):
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, 6:] = 0
    found = influence_of(model, structures, [batch])
    for group, values in found.items():
        layers = model.get_submodule(group)
        shape = []
        hook = layers[0].register_forward_hook(lambda _, a, k, out, to=shape: to.append(a[0].shape), with_kwargs=True)
        with torch.no_grad():
            model(**batch)
        hook.remove()
        keep = batch.get("attention_mask", torch.ones(shape[0][:2])).bool()
        assert torch.allclose(values, by_a_loop(model, batch, group, keep), atol=1e-5)


def test_the_layer_that_turns_least_goes():
    model = build("llama")
    with torch.no_grad():
        for projection in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            projection.weight.mul_(1e-3)
    prune(model, CONFIG, DataLoader(samples(model, 8), batch_size=4, collate_fn=default_data_collator))
    gone = [all(bool((p == 0).all()) for p in layer.parameters()) for layer in model.model.layers]
    assert gone == [False, True, False]


def test_a_layer_that_is_gone_turns_nothing_and_stays_gone():
    model = build("llama")
    batches = [{k: torch.stack([s[k] for s in samples(model, 4)]) for k in ("input_ids", "labels")}]
    config = PruningConfig(sparsities=[1 / 3, 2 / 3], granularity="layer", criterion="block_influence")
    plan = Plan.of(model, config)
    masks = MaskSet()
    gone = []
    for sparsity in config.round_sparsities:
        prune(model, PruningConfig(**{**config.to_dict(), "sparsities": [sparsity], "hold_zeros": True}), batches)
        masks = plan.zeros(model)
        gone.append({i for i in range(3) if not masks[f"model.layers.{i}.mlp.up_proj.weight"].any()})
    assert len(gone[0]) == 1
    assert gone[0] < gone[1]
    assert len(gone[1]) == 2
    values = influence_of(model, plan.structures, batches)["model.layers"]
    assert all(abs(float(values[i])) < 1e-6 for i in gone[1])


@pytest.mark.parametrize("granularity", ["unstructured", "2:4", "head", "neuron", "layer+neuron"])
def test_other_granularities_are_an_error(granularity):
    sparsity = {} if granularity == "2:4" else {"sparsity": 0.5}
    with pytest.raises(
        ValueError, match=r"criterion 'block_influence' scores whole layers, not .*\. Choose granularity layer, or"
    ):
        PruningConfig(**sparsity, granularity=granularity, criterion="block_influence")


def test_without_samples_it_is_an_error():
    with pytest.raises(ValueError, match=r"'block_influence' .* looks at data \(block_influence\). Give a dataloader"):
        prune(build("llama"), CONFIG)


def own(give, *statistics):
    return needs(*statistics, kinds=("layer",))(give)


def test_a_criterion_of_ones_own_scores_structures():
    model = build("llama")
    seen = []

    def give(inputs):
        seen.append(inputs)
        return torch.tensor([2.0, 1.0, 0.0])

    config = PruningConfig(sparsity=1 / 3, granularity="layer")
    prune(model, config, criterion=own(give))
    assert seen[0] == StructureInputs("model.layers", "layer", 3)
    assert (model.model.layers[2].mlp.up_proj.weight == 0).all()
    with pytest.raises(ValueError, match="scores whole layers, not weights"):
        prune(model, PruningConfig(sparsity=0.5), criterion=own(give))


@pytest.mark.parametrize(
    ("criterion", "error", "match"),
    [
        (own(lambda inputs: torch.ones(2)), ValueError, r"of shape \(2,\) for 'model.layers', which has shape \(3,\)"),
        (own(lambda inputs: [1, 2, 3]), TypeError, "gave list for 'model.layers'; it has to give a tensor"),
        (own(lambda inputs: torch.full((3,), torch.nan)), ValueError, "3 of the 3 scores of 'model.layers' are NaN"),
        (
            own(lambda inputs: inputs["block_influence"]),
            ValueError,
            r"put @needs\('block_influence', kinds=\('layer',\)\) of hf_prune.criteria above the function",
        ),
        (own(lambda inputs: torch.ones(3), "depth"), ValueError, "needs depth, which nobody gathers here"),
    ],
)
def test_a_criterion_that_gives_what_it_should_not(criterion, error, match):
    with pytest.raises(error, match=match):
        prune(build("llama"), PruningConfig(sparsity=1 / 3, granularity="layer"), criterion=criterion)


@pytest.mark.parametrize("name", STRUCTURE_CRITERIA)
def test_criteria_need_what_is_gathered(name):
    assert set(STRUCTURE_CRITERIA[name].needs) <= set(STRUCTURE_STATISTICS)


def test_what_is_not_finite_is_an_error():
    model = build("llama")
    plan = Plan.of(model, CONFIG)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"the block influence of 'model.layers' is NaN or infinite"):
        influence_of(model, plan.structures, [inputs_of(model)])
