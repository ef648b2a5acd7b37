"""Masked and shrunk models give the same outputs, and what is removed is what should be."""

import pytest
import torch
import transformers

from hf_prune import MaskSet, PruningConfig, prune, shrink
from hf_prune.structures.families import FAMILIES, Neurons, Stack
from hf_prune.structures.groups import kept_in, nonzeros
from hf_prune.structures.shrinking import find_removable
from tests.structures.models import DECODER, MODELS, T5, build, inputs_of, logits_of, perturbed

GRANULARITIES = ("head", "neuron", "head+neuron", "layer", "query", "query+neuron", "layer+neuron")
SCOPES = ("global", "layer")
GROUPED_QUERIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
# Cells that cannot be, with what the error says.
IMPOSSIBLE = {
    **{
        (name, granularity): "a norm comes behind each sum"
        for name in ("bert", "bert with cross-attention", "roberta", "distilbert", "bart")
        for granularity in ("layer", "layer+neuron")
    },
    **{
        (name, granularity): r"each key-value head in .* has one query.* Choose granularity head\."
        for name in MODELS
        for granularity in ("query", "query+neuron")
        if name not in GROUPED_QUERIES
    },
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


MARKED = [
    pytest.param(*cell, marks=[pytest.mark.slow] * (cell[2] == "layer" and cell[0] not in ("llama", "t5", "vit")))
    for cell in CELLS
]


@pytest.mark.parametrize(("name", "granularity", "scope"), MARKED)
def test_masked_and_shrunk_models_give_the_same_outputs(name, granularity, scope):
    model = build(name, torch.float64)
    dense, parameters = logits_of(model), model.num_parameters()
    report = prune(model, config_of(granularity, scope))
    masked = logits_of(model)
    zeros = sum(row.zeros for row in report.structures)
    assert zeros == sum(row.masked for row in report.structures) > 0
    assert not torch.equal(masked, dense)

    shrink(model)
    assert model.num_parameters() < parameters
    assert (logits_of(model) - masked).abs().max() < 1e-12
    left = sum(those.count for those in find_removable(model).values() if those.kind in granularity)
    # The last query of each of three key-value heads cannot go, and is not found.
    rows = [row for row in report.structures if (row.kind, row.total - row.zeros) != ("query", 3)]
    assert left == sum(row.total - row.zeros for row in rows)


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
                member.parameter.mul_(member.along_axes(factor))
    total = {kind: sum(those.count for those in removable.values() if those.kind == kind) for kind in kinds}
    gone = {kind: sum(len(planted[p]) for p, those in removable.items() if those.kind == kind) for kind in kinds}
    for kind in kinds:
        prune(model, config_of(kind, sparsity=gone[kind] / total[kind]))
    kept = kept_in(removable, nonzeros(removable))
    assert {place: (~each).nonzero().flatten().tolist() for place, each in kept.items()} == planted


def test_others_that_were_built_from_the_same_config_stay_as_they_are():
    model = build("llama")
    teacher = type(model)(model.config).eval()
    logits = logits_of(teacher)
    for granularity in ("layer", "head+neuron"):
        prune(model, config_of(granularity))
        shrink(model)
    assert torch.equal(logits_of(teacher), logits)
    assert teacher.config.num_hidden_layers == 3
    assert model.config is model.model.config is not teacher.config


def test_heads_and_queries_of_the_others_go_one_after_the_other():
    model = build("mistral", torch.float64)
    for granularity, sparsity in (("query", 0.5), ("head", 1 / 3)):
        prune(model, config_of(granularity, "layer", sparsity, hold_zeros=granularity == "query"))
    masked = logits_of(model)
    shrink(model)
    assert (logits_of(model) - masked).abs().max() < 1e-12
    attention = model.model.layers[0].self_attn
    assert (attention.q_proj.out_features, attention.k_proj.out_features) == (4 * 4, 2 * 4)
    assert (attention.num_key_value_groups, model.config.num_attention_heads) == (2, 4)
    assert not hasattr(model.config, "quantization_config")


def test_queries_that_are_zero_in_unequal_numbers_are_not_held():
    model = build("llama")
    attention = model.model.layers[0].self_attn
    with torch.no_grad():  # One of the twelve queries, of width 4.
        attention.q_proj.weight[:4] = attention.o_proj.weight[:, :4] = 0
    before = model.num_parameters()
    with pytest.raises(ValueError, match="are not whole queries"):
        prune(model, config_of("query", hold_zeros=True))
    with pytest.raises(ValueError, match="there is nothing to remove"):
        shrink(model)
    assert model.num_parameters() == before


def test_of_one_key_value_head_queries_go():
    model = perturbed(
        transformers.GemmaForCausalLM(transformers.GemmaConfig(**{**DECODER, "num_key_value_heads": 1, "head_dim": 4}))
    ).double()
    prune(model, config_of("query"))
    masked = logits_of(model)
    shrink(model)
    assert (logits_of(model) - masked).abs().max() < 1e-12
    assert model.model.layers[0].self_attn.k_proj.out_features == 4
    assert sum(layer.self_attn.q_proj.out_features for layer in model.model.layers) == 3 * 4 * 4 // 2


def test_masks_from_before_are_told():
    model = build("llama")
    prune(model, config_of("neuron"))
    masks = MaskSet.from_zeros(model, [f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)])
    shrink(model)
    with pytest.raises(ValueError, match=r"has shape .* has the model been shrunk already"):
        shrink(model, masks)


def test_nothing_is_pruned_as_a_whole():
    model = build("llama")
    prune(model, PruningConfig(sparsity=0.5))
    with pytest.raises(ValueError, match="there is nothing to remove: nothing of the kinds head, neuron, "):
        shrink(model)


def test_all_of_a_place_is_pruned():
    model = build("llama")
    with torch.no_grad():
        for parameter in model.model.layers[1].self_attn.parameters():
            parameter.zero_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"all 3 heads of 'model.layers.1.self_attn' are pruned.*all its weights are"):
        shrink(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_class_that_needs_more_than_a_config_is_left_whole():
    class Wide(transformers.BertPreTrainedModel):
        def __init__(self, config, width):
            super().__init__(config)
            self.bert = transformers.BertModel(config)
            self.head = torch.nn.Linear(16, width)

    model = Wide(build("bert").config, 5)
    prune(model, config_of("neuron"))
    before = model.num_parameters()
    with pytest.raises(ValueError, match=r"Wide cannot be built from its config alone.*Shrink the model inside of it"):
        shrink(model)
    assert model.num_parameters() == before
    shrink(model.bert)
    assert model.num_parameters() < before


def test_a_head_that_its_owner_has_put_there_is_left_alone(tmp_path):
    model = build("bert")
    model.classifier = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    prune(model, config_of("head+neuron"))
    masked = logits_of(model)
    shrink(model).save_pretrained(tmp_path)
    assert (logits_of(model) - masked).abs().max() < 1e-5
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    inputs = inputs_of(model)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).last_hidden_state, model.bert(**inputs).last_hidden_state)


@pytest.mark.parametrize(
    ("changes", "match"),
    [({"use_weighted_layer_sum": True}, "a weight goes to each layer"), ({"out_indices": [1, 3]}, "by their numbers")],
)
def test_layers_that_others_count_on_stay(changes, match):
    if "out_indices" in changes:
        sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 8, "patch_size": 4}
        model = transformers.Dinov2Backbone(transformers.Dinov2Config(**sizes, **changes))
    else:
        model = build("whisper")
        model.config.use_weighted_layer_sum = True
    with pytest.raises(ValueError, match=match):
        prune(model, config_of("layer"))


def test_layers_that_are_excluded_stay():
    model = build("llama")
    prune(model, config_of("layer", sparsity=2 / 3, exclude_modules=[r".*layers\.1\.mlp.*"]))
    first = model.model.layers[1].mlp.up_proj.weight.clone()
    shrink(model)
    assert len(model.model.layers) == 1
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, first)


def test_alignment_heads_of_whisper_are_dropped(caplog):
    model = build("whisper")
    model.generation_config.alignment_heads = [[2, 3], [1, 2]]
    prune(model, config_of("neuron"))
    shrink(model)
    assert model.generation_config.alignment_heads
    prune(model, config_of("head"))
    shrink(model)
    assert model.generation_config.alignment_heads is None
    assert "alignment_heads of the generation config is dropped" in caplog.text


@pytest.mark.parametrize(
    ("model", "config", "match"),
    [
        (
            lambda: transformers.GemmaForCausalLM(
                transformers.GemmaConfig(**{**DECODER, "num_key_value_heads": 1, "head_dim": 4})
            ),
            config_of("head", uniform=True),
            "no head of GemmaForCausalLM can go: no place has more than one",
        ),
        (
            lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**DECODER, "intermediate_size": 8})),
            PruningConfig(sparsity=0.5, granularity="neuron", scope="layer"),
            r"no neuron of LlamaForCausalLM can go: no place has more than 8 \(multiple_of\)",
        ),
    ],
)
def test_nothing_can_go(model, config, match):
    with pytest.raises(ValueError, match=match):
        prune(model(), config)


def one_layer_t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**{**T5, "num_layers": 1, "num_decoder_layers": 1})
    )


def llama_with_a_shared_norm():
    model = build("llama")
    for layer in model.model.layers:
        layer.input_layernorm = model.model.layers[0].input_layernorm
    return model


def llama_with_shared_attention():
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn = model.model.layers[0].self_attn
    return model


@pytest.mark.parametrize("make", [one_layer_t5, llama_with_a_shared_norm, llama_with_shared_attention])
def test_neurons_go_where_heads_or_layers_cannot(make):
    model = perturbed(make()).double()
    prune(model, config_of("neuron", multiple_of=4))
    masked, before = logits_of(model), model.num_parameters()
    shrink(model)
    assert model.num_parameters() < before
    assert (logits_of(model) - masked).abs().max() < 1e-12


def test_neurons_go_when_a_second_round_finds_one_layer_left():
    model = build("t5")
    for granularity, sparsity in (("layer", 2 / 3), ("neuron", 0.5)):
        prune(model, config_of(granularity, sparsity=sparsity))
        shrink(model)
    assert len(model.encoder.block) == len(model.decoder.block) == 1


def clip():
    torch.manual_seed(0)
    side = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        text_config={**side, "vocab_size": 60, "max_position_embeddings": 16},
        vision_config={**side, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    return perturbed(transformers.CLIPModel(config))


def describe_clip(monkeypatch, **fields):
    neurons = (Neurons("mlp", {"fc1": 1}, "fc2", fields=("intermediate_size",)),)
    stacks = tuple(Stack(f"{side}_model.encoder.layers", neurons, **fields) for side in ("text", "vision"))
    monkeypatch.setitem(FAMILIES, "clip", stacks)


@pytest.mark.parametrize("granularity", ["layer", "neuron"])
def test_configs_inside_of_a_config_say_what_is_left(tmp_path, monkeypatch, granularity):
    describe_clip(monkeypatch)
    model = clip()
    prune(model, config_of(granularity, sparsity=1 / 3, scope="auto" if granularity == "layer" else "layer"))
    shrink(model)
    assert model.config.text_config is model.text_model.config
    assert model.config.text_config.num_hidden_layers == len(model.text_model.encoder.layers)
    assert not hasattr(model.config, "num_hidden_layers")
    model.save_pretrained(tmp_path)
    loaded = transformers.CLIPModel.from_pretrained(tmp_path)
    assert {n: p.shape for n, p in loaded.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    images, tokens = torch.randn(2, 3, 8, 8), torch.arange(12).view(2, 6)
    with torch.no_grad():
        outputs = [each(input_ids=tokens, pixel_values=images).logits_per_image for each in (model, loaded)]
    assert (outputs[0] - outputs[1]).abs().max() < 1e-5


def test_layers_that_no_config_counts_stay(monkeypatch):
    describe_clip(monkeypatch, fields=("depth",))
    with pytest.raises(ValueError, match=r"no config says in depth that there are 3"):
        prune(clip(), config_of("layer"))


def test_a_model_that_is_compiled_is_given_without_its_wrapper():
    with pytest.raises(ValueError, match=r"got OptimizedModule\. It contains a LlamaForCausalLM at model\._orig_mod"):
        shrink(torch.compile(build("llama")))
