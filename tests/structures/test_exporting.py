"""A shrunk model is exported as any other."""

import numpy as np
import onnxruntime
import pytest
import torch

from hf_prune import prune, shrink
from tests.structures.models import build, inputs_of
from tests.structures.test_shrinking import config_of


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, values):
        return self.model(values).logits


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_onnx_gives_the_same_outputs(name, tmp_path):
    model = build(name)
    prune(model, config_of("head+neuron"))
    shrink(model)
    (values,) = inputs_of(model).values()
    torch.onnx.export(Logits(model).eval(), (values,), tmp_path / "model.onnx", dynamo=True)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: values.numpy()})
    with torch.no_grad():
        assert np.abs(logits - model(values).logits.numpy()).max() < 1e-5
