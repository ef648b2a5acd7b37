import pytest
import torch

from hf_prune.weights.snapshot import Snapshot
from tests.tiny import FAMILIES, build


def change(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(1)


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_stays_what_it_is_and_gives_the_model_back(family, tmp_path):
    model = build(family)
    parameters, before = list(model.parameters()), state(model)
    best = Snapshot.of(model)
    best.save(tmp_path / "best")
    digest = best.digest()
    change(model)
    assert best.digest() == digest != Snapshot.of(model).digest()
    for found in (best, Snapshot.load(tmp_path / "best")):
        change(model)
        found.restore_(model)
        assert found.digest() == digest
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_a_tied_weight_is_kept_once():
    model = build("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert len(Snapshot.of(model).tensors) == len(list(model.parameters()))


def test_batch_statistics_are_kept_and_what_is_not_saved_is_not():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2))
    model.register_buffer("scratch", torch.zeros(3), persistent=False)
    assert set(Snapshot.of(model).tensors) == set(model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_precision(dtype, tmp_path):
    model = build("llama", dtype)
    best = Snapshot.of(model)
    best.save(tmp_path / "best")
    assert Snapshot.load(tmp_path / "best").digest() == best.digest()


def test_digests_tell_names_shapes_and_dtypes_apart():
    zeros = torch.zeros(2, 3)
    others = [
        {"b": zeros},
        {"a": zeros.view(3, 2)},
        {"a": zeros.double()},
        {"a": zeros + 1},
        {},
        {"a": zeros, "b": zeros},
    ]
    digests = {Snapshot(tensors).digest() for tensors in [{"a": zeros}, *others]}
    assert len(digests) == 1 + len(others)


def test_files_that_are_missing_or_damaged_are_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tensors at .*missing"):
        Snapshot.load(tmp_path / "missing")
    Snapshot.of(build("llama")).save(tmp_path / "best")
    (tmp_path / "best").write_bytes((tmp_path / "best").read_bytes()[:-1])
    with pytest.raises(ValueError, match="best is truncated or not a file of tensors"):
        Snapshot.load(tmp_path / "best")
