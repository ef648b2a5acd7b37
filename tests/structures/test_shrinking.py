"""Masked and shrunk models give the same outputs, and what is removed is what should be."""

import pytest
import torch

from hf_prune import PruningConfig, prune, shrink
from hf_prune.structures.families import FAMILIES
from hf_prune.structures.members import kept_structures, nonzeros
from hf_prune.structures.shrinking import find_removable
from tests.structures.models import MODELS, build, logits_of

GRANULARITIES = ("head", "neuron", "head+neuron", "layer")
SCOPES = ("global", "layer")
# Cells that cannot be, with what the error says.
IMPOSSIBLE = {
    **{(name, "layer"): "a norm comes behind each sum" for name in ("bert", "roberta", "distilbert", "bart")},
}
CELLS = [
    (name, granularity, scope)
    for name in MODELS
    for granularity in GRANULARITIES
    for scope in (SCOPES if granularity != "layer" else ("auto",))
    if (name, granularity) not in IMPOSSIBLE
]


def config_of(granularity, scope="auto", sparsity=0.5, **fields):
    if "neuron" in granularity:
        fields["multiple_of"] = 4
    return PruningConfig(sparsity=sparsity, schedule="one_shot", granularity=granularity, scope=scope, **fields)


def test_every_family_of_the_table_is_tested():
    described = {"my_model"}  # in the example of `describe_family`
    assert {MODELS[name]().config.model_type for name in MODELS} == set(FAMILIES) - described


@pytest.mark.parametrize(("name", "granularity"), IMPOSSIBLE)
def test_a_cell_that_cannot_be_is_an_error(name, granularity):
    with pytest.raises(ValueError, match=IMPOSSIBLE[name, granularity]):
        prune(build(name), config_of(granularity))


@pytest.mark.parametrize(("name", "granularity", "scope"), CELLS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_masked_and_shrunk_models_give_the_same_outputs(name, granularity, scope, dtype, bound):
    model = build(name, dtype)
    dense, parameters = logits_of(model), model.num_parameters()
    report = prune(model, config_of(granularity, scope))
    masked = logits_of(model)
    zeros = sum(row.zeros for row in report.structures)
    assert zeros == sum(row.masked for row in report.structures) > 0
    assert not torch.equal(masked, dense)

    shrink(model)
    assert model.num_parameters() < parameters
    assert (logits_of(model) - masked).abs().max() < bound
    left = sum(those.count for those in find_removable(model).values() if those.kind in granularity)
    assert left == sum(row.total - row.zeros for row in report.structures)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("granularity", ["head+neuron", "layer"])
def test_planted_structures_are_the_ones_that_go(name, granularity):
    if (name, granularity) in IMPOSSIBLE:
        return
    model = build(name)
    generator = torch.Generator().manual_seed(3)
    planted = {}
    kinds = granularity.split("+")
    removable = {place: those for place, those in find_removable(model).items() if those.kind in kinds}
    with torch.no_grad():
        for place, those in removable.items():
            free = [i for i in torch.randperm(those.count, generator=generator).tolist() if i not in those.stay]
            gone = free[: those.count // 2 if those.kind != "neuron" else those.count // 8 * 4]
            planted[place] = sorted(gone)
            for member in those.members:
                keep = torch.ones(those.count)
                keep[gone] = 1e-4
                factor = torch.cat([torch.ones(1), keep])[member.owners + 1]
                shape = [-1 if axis == member.axis else 1 for axis in range(member.parameter.ndim)]
                member.parameter.mul_(factor.view(shape))
    total = {kind: sum(those.count for those in removable.values() if those.kind == kind) for kind in kinds}
    gone = {kind: sum(len(planted[p]) for p, those in removable.items() if those.kind == kind) for kind in kinds}
    for kind in kinds:
        prune(model, config_of(kind, sparsity=gone[kind] / total[kind]))
    kept = kept_structures(removable, nonzeros(removable))
    assert {place: (~each).nonzero().flatten().tolist() for place, each in kept.items()} == planted
