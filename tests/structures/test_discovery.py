"""Discovery, against the table: of families that are known the same is found as was written down."""

import pytest

from hf_prune.structures.discovery import stacks_in
from hf_prune.structures.families import FAMILIES
from hf_prune.structures.small_models import small_model_like
from tests.structures.models import build


def described(stacks):
    """What a family says of where things are, without what counts them."""
    return {
        (stack.layers, part.module, part.columns, *sorted(part.rows.items()))
        for stack in stacks
        for part in stack.parts
    }


@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "gpt_neo", "gpt2", "gpt_neox", "opt", "bert", "vit", "t5", "whisper"]
)
def test_the_same_is_found_as_is_in_the_table(name):
    model = build(name)
    stacks = stacks_in(small_model_like(model))
    table = described(FAMILIES[model.config.model_type])
    found = described(stacks)
    assert found
    assert found <= table  # Versions of Transformers and options have other names there.
    kinds = {part.kind for stack in stacks for part in stack.parts}
    assert kinds == {"head", "neuron"}
    fields = {(stack.layers, stack.fields) for stack in stacks}
    assert fields <= {(stack.layers, stack.fields) for stack in FAMILIES[model.config.model_type]}
