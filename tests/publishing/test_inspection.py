"""Saved models, read tensor by tensor: what is counted is what torch counts in the model."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hf_prune import PruningConfig, prune, save_pretrained, shrink
from hf_prune.publishing.folders import SavedModel, local_folder
from hf_prune.publishing.inspection import report_folder
from tests.tiny import FAMILIES, build

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def saved(folder: Path, family: str = "llama", config: PruningConfig | None = None, **options) -> Path:
    dtype = options.pop("dtype", torch.float32)
    model = build(family, dtype)
    prune(model, config or PruningConfig(sparsity=0.8))
    save_pretrained(model, folder, **options)
    return folder


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_zeros_are_counted(family, compress, tmp_path):
    folder = saved(tmp_path, family, compress=compress)
    report = report_folder(folder)
    plain = tmp_path / "plain"
    saved(plain, family)
    expected = load_file(plain / "model.safetensors")
    if not compress:
        assert {row.name for row in report.tensors} == set(expected)
        for row in report.tensors:
            tensor = expected[row.name]
            assert (row.shape, row.dtype) == (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            assert row.zeros == int((tensor == 0).sum())
            assert row.bytes == tensor.nbytes
    assert report.zeros == sum(int((tensor == 0).sum()) for tensor in expected.values())
    assert report.total == sum(tensor.numel() for tensor in expected.values())
    assert any(row.compressed for row in report.tensors) == compress
    assert (report.bytes < sum(tensor.nbytes for tensor in expected.values())) == compress


@pytest.mark.parametrize("dtype", DTYPES)
def test_negative_zeros_are_zeros_and_the_smallest_numbers_are_not(dtype, tmp_path):
    tiny = torch.finfo(dtype).smallest_normal
    save_file(
        {"a": torch.tensor([[0.0, -0.0, tiny, -tiny], [0, 0, 0, 0]], dtype=dtype)}, tmp_path / "model.safetensors"
    )
    (row,) = report_folder(tmp_path).tensors
    assert (row.zeros, row.zero_rows) == (6, 1)


@pytest.mark.parametrize(
    ("granularity", "patterns"), [("2:4", ("2:4", "4:8")), ("1:4", ("1:4", "2:8", "2:4", "4:8")), ("4:8", ("4:8",))]
)
def test_patterns_are_found(granularity, patterns, tmp_path):
    folder = saved(tmp_path, config=PruningConfig(granularity=granularity))
    rows = {row.name: row for row in report_folder(folder).tensors}
    assert rows["model.layers.0.mlp.up_proj.weight"].patterns == patterns
    assert rows["model.embed_tokens.weight"].patterns == ()
    assert ", ".join(patterns) in str(report_folder(folder))


def test_a_pattern_that_one_group_lacks_is_none(tmp_path):
    weight = torch.ones(64, 64)
    weight[:, ::2] = 0
    save_file({"a": weight}, tmp_path / "model.safetensors")
    assert "2:4" in report_folder(tmp_path).tensors[0].patterns
    weight[63, 60:] = 1
    weight[0, :8] = 0
    save_file({"a": weight}, tmp_path / "model.safetensors")
    assert "2:4" not in report_folder(tmp_path).tensors[0].patterns


@pytest.mark.parametrize(
    ("family", "name", "expected"),
    [
        ("gpt2", "transformer.h.0.mlp.c_fc.weight", ("2:4 (dim 0)", "4:8 (dim 0)")),
        ("resnet", "resnet.encoder.stages.0.layers.0.layer.1.convolution.weight", ("2:4 (dim 1)", "4:8 (dim 1)")),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.0.w1.weight", ("2:4", "4:8")),
    ],
)
def test_patterns_are_found_along_the_inputs_of_other_layers(family, name, expected, tmp_path):
    rows = {row.name: row for row in report_folder(saved(tmp_path, family, PruningConfig(granularity="2:4"))).tensors}
    assert rows[name].patterns == expected


ALL_DTYPES = [
    *DTYPES, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8,
    torch.uint16, torch.uint32, torch.uint64, torch.bool,
]  # fmt: skip
SHAPES = [
    (), (0,), (0, 4), (4, 0), (1,), (8,), (32,), (32, 1), (12, 1), (4, 1), (1, 32), (1, 1), (8, 8), (4, 6), (3, 4, 1),
    (2, 8, 1), (2, 3, 8), (1, 8, 1), (8, 1, 1, 1), (6, 8, 1, 1), (8, 4, 3, 3), (4, 8, 1, 3),
]  # fmt: skip


def slow_patterns(kept: torch.Tensor) -> set[str]:
    """What `TensorZeros.patterns` may hold, by the definition: the implied ones too."""
    found = set()
    if 0 < kept.count_nonzero() < kept.numel() and kept.ndim > 1:
        for dim in (-1, 0 if kept.ndim == 2 else 1):
            for n, m in ((1, 4), (2, 8), (2, 4), (4, 8)):
                groups = kept.movedim(dim, -1)
                if groups.shape[-1] % m == 0 and int(groups.unflatten(-1, (-1, m)).sum(-1).max()) <= n:
                    found.add(f"{n}:{m}" if dim == -1 else f"{n}:{m} (dim {dim})")
    return found


def test_tensors_of_every_shape_and_dtype_are_read(tmp_path):
    """Among them the position bias of a T5 that was pruned down to one head: `[32, 1]`."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for shape in SHAPES:
        for share in (0.5, 0.9):
            kept = torch.rand(shape, generator=generator) > share
            dtypes = ALL_DTYPES if (shape, share) in (((12, 1), 0.5), ((4, 8, 1, 3), 0.9)) else [torch.float32]
            tensors |= {f"{list(shape)} {share} {dtype}": kept.to(dtype) for dtype in dtypes}
    save_file(tensors, tmp_path / "model.safetensors")
    for row in report_folder(tmp_path).tensors:
        kept = tensors[row.name].to(torch.int32) != 0
        assert (row.shape, row.total, row.zeros) == (tuple(kept.shape), kept.numel(), int((~kept).sum())), row.name
        assert set(row.patterns) == slow_patterns(kept), row.name
        rows = kept.flatten(1) if kept.ndim > 1 and kept.numel() else torch.ones(1, 1, dtype=torch.bool)
        assert row.zero_rows == int((~rows.any(1)).sum()), row.name


def test_a_t5_with_one_head_left(tmp_path):
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config)
    prune(model, PruningConfig(sparsity=0.75, granularity="head"))
    shrink(model).save_pretrained(tmp_path)
    name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert {row.name: row.shape for row in report_folder(tmp_path).tensors}[name] == (32, 1)


def test_patterns_along_the_first_dimension_are_those_of_the_transpose(tmp_path):
    torch.manual_seed(0)
    for rows, width in ((8, 3), (64, 5), (1000, 9000)):
        weight = torch.randn(rows, width)
        for group in weight.view(rows // 4, 4, width):
            group.masked_fill_(group.abs().argsort(0).argsort(0) < 2, 0)
        save_file({"a": weight}, tmp_path / "model.safetensors")
        assert report_folder(tmp_path).tensors[0].patterns == ("2:4 (dim 0)", "4:8 (dim 0)")
        weight[-4:, -1] = 1
        save_file({"a": weight}, tmp_path / "model.safetensors")
        assert "2:4 (dim 0)" not in report_folder(tmp_path).tensors[0].patterns


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_every_byte_of_a_small_dtype_is_what_torch_says(name, tmp_path):
    dtype = getattr(torch, name)
    values = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(dtype)
    save_file({"a": values}, tmp_path / "model.safetensors")
    assert report_folder(tmp_path).tensors[0].zeros == int((values.float() == 0).sum())


def test_weights_that_files_put_together_are_said(tmp_path):
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, use_swiglu_ffn=True, image_size=8,
        patch_size=4, num_labels=3,
    )  # fmt: skip
    model = transformers.Dinov2ForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    prune(model, PruningConfig(sparsity=0.5, granularity="neuron", multiple_of=1))
    model.save_pretrained(tmp_path)
    report = report_folder(tmp_path)
    # Files of some versions of Transformers have them apart.
    assert bool(report.structures) != ("together that the model has apart" in str(report))


def test_integers_have_no_sign_to_leave_out(tmp_path):
    values = {dtype: torch.tensor([[0, 1, 128, 0]]).to(dtype) for dtype in (torch.uint8, torch.int8, torch.int64)}
    values[torch.bool] = torch.tensor([[True, False, False, True]])
    save_file({str(dtype): tensor for dtype, tensor in values.items()}, tmp_path / "model.safetensors")
    assert [row.zeros for row in report_folder(tmp_path).tensors] == [2] * 4


def test_what_is_dense_or_empty_has_no_pattern(tmp_path):
    save_file({"a": torch.ones(8, 8), "b": torch.zeros(8, 8), "c": torch.zeros(0, 4), "d": torch.tensor(0.0)},
              tmp_path / "model.safetensors")  # fmt: skip
    rows = {row.name: row for row in report_folder(tmp_path).tensors}
    assert [row.patterns for row in rows.values()] == [()] * 4
    assert [row.zeros for row in rows.values()] == [0, 64, 0, 1]


def test_of_two_models_in_a_folder_the_one_that_transformers_reads_is_read(tmp_path):
    saved(tmp_path, max_shard_size="10KB")
    build("llama").save_pretrained(tmp_path / "dense")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "dense" / "model.safetensors").read_bytes())
    assert report_folder(tmp_path).zeros == 0


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize(
    ("family", "granularity"),
    [(family, kind) for family in ("gpt2", "gpt_neo", "vit", "bert") for kind in ("head", "neuron")]
    + [("llama", "neuron"), ("gpt2", "layer"), ("resnet", "channel"), ("t5", "head+neuron")],
)
def test_structures_are_found(family, granularity, compress, tmp_path):
    config = PruningConfig(sparsity=0.5, granularity=granularity, multiple_of=1) if granularity not in (
        "head", "layer") else PruningConfig(sparsity=0.5, granularity=granularity)  # fmt: skip
    model = build(family)
    expected = {(row.name, row.kind): (row.zeros, row.total) for row in prune(model, config).structures}
    save_pretrained(model, tmp_path, compress=compress)
    report = report_folder(tmp_path)
    found = {(row.name, row.kind): (row.zeros, row.total) for row in report.structures}
    assert found.items() >= expected.items()
    kinds = {kind for _, kind in expected}
    if granularity not in ("layer", "channel"):  # Of a layer that is gone, heads and neurons are gone too.
        assert {kind for _, kind in found} == kinds
    assert report.to_dict()["structures"]
    assert all(name in str(report) for name, _ in expected)


def test_models_without_structures_that_are_gone_show_none(tmp_path):
    assert report_folder(saved(tmp_path / "a", config=PruningConfig(sparsity=0.3))).structures == ()
    weight = torch.ones(4, 4)
    weight[1] = 0
    (tmp_path / "b").mkdir()
    save_file({"x": weight}, tmp_path / "b" / "model.safetensors")
    assert report_folder(tmp_path / "b").structures == ()


@pytest.mark.parametrize(
    "values",
    [
        {"pad_token_id": 1000},
        {"hidden_act": "nope"},
        {"num_attention_heads": 0},
        {"vocab_size": -5},
        {"model_type": "x"},
    ],
)
def test_zeros_are_counted_whatever_the_config_says(values, tmp_path):
    folder = saved(tmp_path, config=PruningConfig(sparsity=0.5, granularity="neuron"))
    config = json.loads((folder / "config.json").read_text())
    report = report_folder(folder)
    assert report.structures
    assert report.structures_unknown is None
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    again = report_folder(folder)
    assert again.tensors == report.tensors
    assert bool(again.structures) == (again.structures_unknown is None)
    assert again.structures_unknown is None or f"not known: {again.structures_unknown}" in str(again)


def test_why_structures_are_not_known_is_said(tmp_path, monkeypatch):
    folder = saved(tmp_path, "resnet", PruningConfig(sparsity=0.5, granularity="channel", multiple_of=1))
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    report = report_folder(folder)
    assert "channels need torch-pruning" in report.structures_unknown
    assert "Whether whole structures are zero is not known: ModuleNotFoundError: channels need" in str(report)


def test_a_shrunk_model_says_so(tmp_path):
    model = build("gpt2")
    prune(model, PruningConfig(sparsity=0.5, granularity="head"))
    shrink(model).save_pretrained(tmp_path)
    assert "The model was shrunk: 6 tensors have shapes that no config of its family can say." in str(
        report_folder(tmp_path)
    )


def damage(folder: Path, how: str) -> None:
    file, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if how in ("another place", "index", "nested", "no map") or how.startswith("map of"):
        file.rename(folder / "model-0.safetensors")
    if how == "no file":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "another place":
        index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    elif how == "index":
        index.write_text("{")
    elif how.startswith("map of"):
        maps = {"nothing": {}, "a list": [], "numbers": {"a": 1}}
        index.write_text(json.dumps({"weight_map": maps[how.removeprefix("map of ")]}))
    elif how == "nested":
        index.write_text("[" * 100_000)
    elif how == "no map":
        index.write_text("{}")
    elif how == "record":
        (folder / "config.json").write_text('{"quantization_config": {"quant_method": "hf_prune", "compressed": 5}}')
    elif how == "config":
        (folder / "config.json").write_text("[]")
    else:
        tensors = load_file(file)
        del tensors[next(name for name in tensors if name.endswith(":bitmask"))]
        save_file(tensors, file)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no file", r"is not a saved model: it has no model\.safetensors"),
        ("truncated", "is truncated or not a file of weights"),
        ("another place", r"names '\.\./model\.safetensors', which is not a file beside it"),
        ("index", "is truncated or not JSON"),
        ("nested", "is truncated or not JSON"),
        *((f"map of {what}", "must name a file for each weight") for what in ("nothing", "a list", "numbers")),
        ("no map", "must name a file for each weight"),
        ("record", "'compressed' of a pruned model, recorded in config.json, must be an object: 5"),
        ("config", "must hold an object, got list"),
        ("bits", "is compressed, and its bits are missing"),
    ],
)
def test_damaged_models_are_an_error(how, message, tmp_path):
    folder = saved(tmp_path, compress=True)
    damage(folder, how)
    with pytest.raises(ValueError, match=message):
        report_folder(folder)


def test_names(tmp_path):
    assert local_folder(str(tmp_path)) == tmp_path
    with pytest.raises(ValueError, match="'no/such/folder' is neither a folder nor a name on the Hub"):
        local_folder("no/such/folder")


def test_a_tensor_is_read_when_it_is_asked_for(tmp_path):
    model = SavedModel(saved(tmp_path))
    name = "model.norm.weight"
    assert name in model
    assert len(model) == len(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(model[name].tensor, load_file(tmp_path / "model.safetensors")[name])
