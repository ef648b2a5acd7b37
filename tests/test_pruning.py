"""Walks the public tables: every family, criterion, granularity and scope, from perturbed weights."""

import itertools
import random
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.utils.data import DataLoader
from transformers import default_data_collator

from hf_prune import MaskSet, PruningConfig, ScoreInputs, prune, sparsity_report
from hf_prune.calibration.samples import CalibrationData
from hf_prune.criteria import RECONSTRUCTIONS
from hf_prune.plan import Plan, resolve
from hf_prune.pruning import cut_
from hf_prune.schedules import SCHEDULES
from hf_prune.scopes import SCOPES
from hf_prune.selection.scoring import CRITERION_NAMES
from hf_prune.structures.criteria import STRUCTURE_CRITERIA
from hf_prune.weights.masks import masked_in
from hf_prune.weights.targets import Target, find_targets
from tests.tiny import FAMILIES, batch, build, twin

GRANULARITIES = ["unstructured", "1:4", "2:4", "block:2x4"]

# Cells that cannot be, each with the words of the error that says so.
IMPOSSIBLE = {
    ("convnext", "1:4"): "1:4 needs in_features divisible by 4; '.*dwconv' has 1",
    ("convnext", "2:4"): "2:4 needs in_features divisible by 4; '.*dwconv' has 1",
    ("convnext", "block:2x4"): "block:2x4 needs .*dwconv' is 8 x 1",
}


def refusal_of(criterion: str, granularity: str, scope: str) -> str | None:
    """The words of the error with which a config refuses a combination."""
    if granularity in ("1:4", "2:4") and scope != "auto":
        return "scope does not apply to granularity"
    if criterion in STRUCTURE_CRITERIA:
        return f"criterion '{criterion}' scores whole .*, not weights"
    if criterion in RECONSTRUCTIONS and granularity.startswith("block"):
        return f"^{criterion} chooses weights one by one"
    if criterion in RECONSTRUCTIONS and scope == "row":
        return f"^{criterion} compares weights within"
    return None


CELLS = list(itertools.product(CRITERION_NAMES, GRANULARITIES, SCOPES))
REFUSED = {cell: words for cell in CELLS if (words := refusal_of(*cell))}
TAKEN = [cell for cell in CELLS if cell not in REFUSED]


def config_of(criterion: str, granularity: str, scope: str, **options: Any) -> PruningConfig:
    """A config of a cell, with a sparsity where the granularity does not say it."""
    sparsity = {} if granularity in ("1:4", "2:4") else {"sparsity": 0.7}
    return PruningConfig(criterion=criterion, granularity=granularity, scope=scope, **{**sparsity, **options})


def data(model: nn.Module) -> DataLoader:
    return DataLoader(batch(model, 4), batch_size=2, collate_fn=default_data_collator)


def of_rows(target: Target, sparsity: float, group: int) -> int:
    """Weights that go if each row of weights, or of 2x4 blocks, is equally sparse."""
    groups = target.in_features // 4 if group == 8 else target.fan_in
    return target.weight.numel() // groups * round(sparsity * groups)


def zeros(model: nn.Module, targets: dict[str, Target]) -> int:
    return sum(int((model.get_parameter(name) == 0).sum()) for name in targets)


@pytest.mark.parametrize(("criterion", "granularity", "scope"), REFUSED)
def test_combinations_that_make_no_sense_are_an_error(criterion, granularity, scope):
    with pytest.raises(ValueError, match=REFUSED[criterion, granularity, scope]):
        config_of(criterion, granularity, scope)


def cube() -> list[Any]:
    """All cells of all families; slow are those that differ from quick ones in the family and the scope at once."""
    cells = itertools.product(FAMILIES, TAKEN)
    slow = {(f, cell): f not in ("gpt2", "resnet") and cell[-1] != "auto" for f, cell in cells}
    return [pytest.param(f, *cell, marks=[pytest.mark.slow] * is_slow) for (f, cell), is_slow in slow.items()]


@pytest.mark.parametrize(("family", "criterion", "granularity", "scope"), cube())
def test_every_cell_is_exact(family, criterion, granularity, scope):
    model = build(family)
    targets = find_targets(model)
    total = sum(target.weight.numel() for target in targets.values())
    assert zeros(model, targets) == 0
    config = config_of(criterion, granularity, scope)
    if (family, granularity) in IMPOSSIBLE:
        with pytest.raises(ValueError, match=IMPOSSIBLE[family, granularity]):
            prune(model, config, data(model))
        assert zeros(model, targets) == 0
        return
    if criterion == "movement":
        with pytest.raises(ValueError, match="'movement' needs movement, which nobody gathers here"):
            prune(model, config, data(model))
        return
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    report = prune(model, config, data(model))

    sparsity = config.round_sparsities[-1]
    group = 8 if granularity.startswith("block") else 1
    scope = resolve(config).scope.name
    is_pattern = granularity in ("1:4", "2:4")
    if scope == "row" and not is_pattern:
        expected = sum(of_rows(target, sparsity, group) for target in targets.values())
    elif scope == "layer" and not is_pattern:
        expected = sum(group * round(sparsity * module.total / group) for module in report.modules)
    else:
        expected = group * round(sparsity * total / group)
    assert zeros(model, targets) == report.zeros == report.masked == expected
    assert report.total == total
    for name, parameter in model.named_parameters():
        kept = parameter != 0
        assert criterion in RECONSTRUCTIONS or torch.equal(parameter[kept], before[name][kept])
        if name not in targets:
            assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sparsity", [0.0, 0.123456, 0.5, 0.999])
def test_global_magnitude_equals_torch_prune(family, sparsity):
    ours, theirs = build(family), build(family)
    report = prune(ours, PruningConfig(sparsity=sparsity))
    # Fused experts are parameters of a module that torch.nn.utils.prune takes as it takes any other.
    names = [name.rpartition(".") for name in find_targets(theirs)]
    parameters = [(theirs.get_submodule(module), parameter) for module, _, parameter in names]
    torch_prune.global_unstructured(parameters, torch_prune.L1Unstructured, amount=round(sparsity * report.total))
    for module, _, parameter in names:
        expected = getattr(theirs.get_submodule(module), parameter)
        assert torch.equal(ours.get_parameter(f"{module}.{parameter}"), expected)


@pytest.mark.parametrize(
    ("criterion", "granularity", "scope"), [cell for cell in TAKEN if cell[1] in ("unstructured", "block:2x4")]
)
def test_rounds_are_monotone_and_exact(criterion, granularity, scope):
    model = build("llama")
    config = config_of(criterion, granularity, scope, sparsity=0.9, schedule="geometric", rounds=6)
    plan, masks = Plan.of(model, config), MaskSet()
    gathered = {"movement": {name: torch.randn_like(target.weight) for name, target in plan.targets.items()}}
    given = CalibrationData(lambda: data(model), gathered)
    for sparsity in config.round_sparsities:
        previous, masks = masks, cut_(model, plan, masks, sparsity, given)
        masks.apply_(model)
        with torch.no_grad():  # Whatever fine-tuning does to the kept weights, what is pruned stays pruned.
            for name, mask in masks.items():
                model.get_parameter(name).add_(torch.randn_like(mask, dtype=torch.float32) * mask)
        for name, mask in previous.items():
            assert not (masks[name] & ~mask).any()
        if resolve(config).scope.name in ("global", "erk", "owl"):
            size = 8 if granularity.startswith("block") else 1
            assert masks.masked == size * round(sparsity * masks.total / size)
        if resolve(config).scope.name == "layer":
            for mask in masks.values():
                size = 8 if granularity.startswith("block") else 1
                assert masked_in(mask) == size * round(sparsity * mask.numel() / size)


@pytest.mark.parametrize("rounds", range(1, 21))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_is_exact_after_each_round(schedule, rounds):
    """Whatever the target: a schedule may round as it likes, the number of masked weights may not."""
    if (schedule, rounds) == ("hybrid", 1) or (schedule == "one_shot" and rounds > 1):
        return
    rng = random.Random(rounds)
    torch.manual_seed(rounds)
    model = nn.Sequential(nn.Linear(37, 29), nn.Linear(29, 41))
    total = 29 * 37 + 41 * 29
    for sparsity in [0.05, 0.995, *(round(rng.uniform(0.05, 0.995), 3) for _ in range(4))]:
        config = PruningConfig(sparsity=sparsity, schedule=schedule, rounds=rounds)
        masks = MaskSet()
        for asked in config.round_sparsities:
            masks = Plan.of(model, config).next_masks(masks, asked)
            assert masks.masked == round(asked * total)
        assert len(config.round_sparsities) == rounds
        assert masks.masked == round(sparsity * total)


def test_pattern_rounds_go_through_all_patterns():
    model = build("llama")
    config = PruningConfig(granularity="1:4", rounds=3)
    assert config.round_sparsities == [0.25, 0.5, 0.75]
    plan, masks = Plan.of(model, config), MaskSet()
    for sparsity, kept in zip(config.round_sparsities, (3, 2, 1), strict=True):
        previous, masks = masks, plan.next_masks(masks, sparsity)
        for name, mask in masks.items():
            assert (mask.view(-1, 4).sum(1) == kept).all()
            assert name not in previous or not (mask & ~previous[name]).any()


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "resnet"])
@pytest.mark.parametrize("granularity", ["1:4", "2:4"])
def test_every_group_along_the_input_is_exact(family, granularity):
    model = build(family)
    prune(model, PruningConfig(granularity=granularity))
    for name, target in find_targets(model).items():
        weight = model.get_parameter(name)
        rows = {2: weight.T if family == "gpt2" else weight, 3: weight, 4: weight.movedim(1, -1)}[weight.ndim]
        groups = rows.reshape(-1, rows.shape[-1] // 4, 4)
        assert ((groups != 0).sum(-1) == int(granularity[0])).all(), target.name


def test_blocks_are_whole():
    model = build("gpt2")
    prune(model, PruningConfig(sparsity=0.5, granularity="block:4x8"))
    for name in find_targets(model):
        weight = model.get_parameter(name).T  # Conv1D
        blocks = (weight != 0).reshape(weight.shape[0] // 4, 4, -1, 8).sum((1, 3))
        assert ((blocks == 0) | (blocks == 32)).all()


def test_layer_sparsity_leaves_the_rest_to_compete():
    model = build("llama")
    config = PruningConfig(
        sparsity=0.8, schedule="constant", rounds=2, layer_sparsity={r".*\.0\.mlp\..*": 0.25, r".*q_proj": 0.0}
    )
    plan = Plan.of(model, config)
    masks = plan.next_masks(MaskSet(), config.round_sparsities[0])
    down = masks["model.layers.0.mlp.down_proj.weight"]
    assert int((~down).sum()) == down.numel() // 8  # half of the way
    masks = plan.next_masks(masks, config.round_sparsities[1])
    own = {name: mask for name, mask in masks.items() if ".0.mlp." in name}
    assert all(int((~mask).sum()) == mask.numel() // 4 for mask in own.values())
    assert all(mask.all() for name, mask in masks.items() if "q_proj" in name)
    rest = MaskSet({n: m for n, m in masks.items() if n not in own and "q_proj" not in n})
    assert rest.masked == round(0.8 * rest.total)


def test_layer_sparsity_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"'nothing' matches none of the targeted modules, such as 'model\."):
        prune(build("llama"), PruningConfig(sparsity=0.5, layer_sparsity={"nothing": 0.3}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    report = prune(build("llama", dtype), PruningConfig(sparsity=0.7))
    assert report.zeros == round(0.7 * report.total)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("config", [PruningConfig(sparsity=0.5, criterion="random"), PruningConfig(granularity="2:4")])
def test_a_weight_that_is_not_finite_is_an_error_that_names_it_and_changes_nothing(config, value):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    before = twin(model).state_dict()
    with pytest.raises(
        ValueError, match=r"1 of the 512 weights of 'model\.layers\.1\.mlp\.up_proj\.weight' are NaN or"
    ):
        prune(model, config)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("config", [PruningConfig(sparsity=0.5), PruningConfig(granularity="2:4")])
def test_a_nan_score_is_an_error_that_names_the_tensor(config):
    def criterion(inputs: ScoreInputs) -> torch.Tensor:
        return torch.where(inputs.weight == inputs.weight.max(), torch.nan, inputs.weight)

    with pytest.raises(
        ValueError, match=r"1 of the 256 scores of 'model\.layers\.0\.self_attn\.q_proj\.weight' are NaN"
    ):
        prune(build("llama"), config, criterion=criterion)


def test_holding_zeros():
    model = build("llama")
    prune(model, PruningConfig(sparsity=0.4, criterion="random"))
    held = MaskSet.from_zeros(model)
    # Random scores would choose others; the held zeros enter the mask first.
    report = prune(model, PruningConfig(sparsity=0.6, criterion="random", hold_zeros=True), seed=1)
    assert report.zeros == report.masked == round(0.6 * report.total)
    for name, mask in held.items():
        assert not model.get_parameter(name)[~mask].any()
    before = twin(model).state_dict()
    assert prune(model, PruningConfig(hold_zeros=True)).masked == report.masked
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(sparsity=0.3), "0.4000 of the targets is zero already, more than the sparsity 0.2999 asked for"),
        (dict(sparsity=0.1, scope="layer"), "of 'model.layers.0.* is zero already"),
        (dict(granularity="3:4"), "has groups of 4 with more than 1 zeros already"),
        (dict(sparsity=0.6, granularity="block:4x4"), "are not whole blocks of 4x4"),
    ],
)
def test_zeros_that_cannot_be_held_are_an_error(config, message):
    model = build("llama")
    prune(model, PruningConfig(sparsity=0.4))
    with pytest.raises(ValueError, match=message):
        prune(model, PruningConfig(**config, hold_zeros=True))


def test_zeros_beyond_the_mask_are_told_apart():
    model = build("llama")
    nn.init.zeros_(model.model.layers[0].mlp.up_proj.weight)
    report = prune(model, PruningConfig(sparsity=0.5, criterion="random"))
    assert report.masked == round(0.5 * report.total) < report.zeros
    assert f"{report.zeros - report.masked:,} of the zeros are not pruned" in str(report)


def test_a_users_criterion():
    model = build("llama")

    def keep_late_inputs(inputs: ScoreInputs) -> torch.Tensor:
        assert inputs.name.endswith("q_proj.weight")
        return torch.arange(inputs.weight.shape[1], dtype=torch.float32).expand_as(inputs.weight)

    prune(model, PruningConfig(sparsity=0.5, target_modules=["q_proj"]), criterion=keep_late_inputs)
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert not weight[:, :8].any()
    assert weight[:, 8:].all()


def test_a_criterion_of_wrong_shape_is_an_error():
    with pytest.raises(ValueError, match=r"the criterion gave scores of shape \(16,\) for 'model.layers.0"):
        prune(build("llama"), PruningConfig(sparsity=0.5), criterion=lambda inputs: inputs.weight.abs().sum(1)[:16])


def test_the_seed_decides_what_random_prunes():
    def pruned(seed: int) -> str:
        model = build("gpt2")
        prune(model, PruningConfig(sparsity=0.5, criterion="random"), seed=seed)
        return MaskSet.from_zeros(model).digest()

    assert pruned(0) == pruned(0) != pruned(1)


def test_pruning_leaves_names_config_and_buffers_alone():
    model = build("llama")
    parameters, config = dict(model.named_parameters()), model.config.to_json_string()
    prune(model, PruningConfig(sparsity=0.5))
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert model.config.to_json_string() == config
    assert sparsity_report(model).sparsity == 0.5


def test_a_criterion_that_changes_its_mind_is_an_error():
    with pytest.raises(ValueError, match="instead of 3072 were dropped: the criterion gave other scores when"):
        prune(build("gpt2"), PruningConfig(sparsity=0.5), criterion=lambda inputs: torch.rand_like(inputs.weight))


def test_a_criterion_that_changes_the_weight_is_an_error():
    with pytest.raises(ValueError, match=r"the criterion changed 'transformer\.h\.0\.attn\.c_attn\.weight' in place"):
        prune(build("gpt2"), PruningConfig(sparsity=0.5), criterion=lambda inputs: inputs.weight.abs_())


def test_a_criterion_that_gives_no_tensor_is_an_error():
    with pytest.raises(TypeError, match=r"the criterion gave NoneType for 'transformer.*; it has to give a tensor"):
        prune(build("gpt2"), PruningConfig(sparsity=0.5), criterion=lambda inputs: None)
