"""Saving and pushing, by the real client of the Hub to a hub on this machine."""

import copy
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel, Trainer

import hf_prune
from hf_prune import (
    MaskSet,
    PruningConfig,
    PruningHistory,
    PruningTrainerCallback,
    keep_sparsity,
    prune,
    push_to_hub,
    save_pretrained,
    shrink,
)
from hf_prune.weights.snapshot import Snapshot
from tests.hub import TOKEN, Hub, environment_of, running_hub, use
from tests.processes import on_two_processes, results_in_turn
from tests.structures.models import build as build_of_structures
from tests.tiny import batch, build
from tests.trainers import FSDP, trainer_factory, zero

CONFIG = PruningConfig(sparsity=0.8, schedule="geometric", rounds=2, end=4)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running_hub() as hub:
        use(hub.url, monkeypatch, str(tmp_path / "cache"))
        yield hub


def train(
    make_trainer, config: PruningConfig = CONFIG, model: PreTrainedModel | None = None, **options
) -> tuple[Trainer, PruningHistory]:
    pruning = PruningTrainerCallback(config)
    trainer = make_trainer(model or build("llama"), pruning, eval_strategy="steps", eval_steps=1, **options)
    pruning.evaluate = trainer.evaluate
    trainer.train()
    return trainer, pruning.history


def pruned() -> PreTrainedModel:
    model = build("llama")
    prune(model, PruningConfig(sparsity=0.8))
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    # Of a copy: the last bit of a product depends on where in the memory a file's tensors begin.
    with torch.no_grad():
        return copy.deepcopy(model).eval()(input_ids=torch.arange(1, 13).view(2, 6)).logits


# Pushed, and read by somebody else


LOAD = """
    import json, sys
    from pathlib import Path
    import torch
    from transformers import LlamaForCausalLM
    from tests.publishing.test_hub import logits

    for name in sys.argv[2:]:
        if name == "adapter":
            from hf_prune import keep_sparsity
            from peft import PeftModel
            base = LlamaForCausalLM.from_pretrained("tester/unstructured")
            model = keep_sparsity(PeftModel.from_pretrained(base, "tester/adapter"))
            merged = keep_sparsity(PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("tester/unstructured"),
                                                             "tester/adapter")).merge_and_unload()
            torch.save({"logits": logits(merged), **merged.state_dict()}, Path(sys.argv[1]) / "merged")
        else:
            model = LlamaForCausalLM.from_pretrained(f"tester/{name}")
        torch.save(logits(model), Path(sys.argv[1]) / name)
"""


def with_adapter(base: PreTrainedModel) -> PeftModel:
    model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("lfs", [True, False])
def test_what_was_pushed_is_what_a_new_process_loads(lfs, hub, tmp_path):
    hub.lfs = lfs
    uniform, uneven = build_of_structures("llama"), build_of_structures("llama")
    prune(uniform, PruningConfig(sparsity=0.5, granularity="neuron", multiple_of=4, uniform=True))
    prune(uneven, PruningConfig(sparsity=0.5, granularity="head+neuron", multiple_of=4))
    models: dict[str, torch.nn.Module] = {
        "unstructured": pruned(),
        "compressed": pruned(),
        "uniform": shrink(uniform),
        "uneven": shrink(uneven),
    }
    assert not hasattr(models["uniform"].config, "quantization_config")
    assert models["uneven"].config.quantization_config["shapes"]
    for name, model in models.items():
        push_to_hub(model, name, compress=name == "compressed")
    models["adapter"] = keep_sparsity(with_adapter(models["unstructured"]))
    models["adapter"].push_to_hub("tester/adapter")
    for folder in ("loaded", "home"):
        (tmp_path / folder).mkdir()
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOAD), str(tmp_path / "loaded"), *models], check=True, timeout=120,
        cwd=Path(__file__).parents[1], env={**os.environ, **environment_of(hub, str(tmp_path / "home"))},
    )  # fmt: skip
    for name, model in models.items():
        found = torch.load(tmp_path / "loaded" / name, weights_only=True)
        assert torch.equal(found, logits(model)), name
    merged = torch.load(tmp_path / "loaded" / "merged", weights_only=True)
    assert torch.allclose(merged["logits"], logits(models["adapter"]), atol=1e-5)
    for name, mask in MaskSet.from_zeros(models["unstructured"]).items():
        assert torch.equal(merged[name] == 0, ~mask)
    put = [path for method, path in hub.requests if method == "PUT"]
    assert bool(put) == lfs


KINDS = {"ddp": ({}, True), "fsdp": (FSDP, True), "zero-2": (zero(2), False), "zero-3": (zero(3), False)}
"""How two processes train, and whether what they push is compressed."""


def push_what_was_trained(rank: int, folder: Path, url: str) -> list[dict[str, torch.Tensor]]:
    """Trains on two processes, and pushes the trainer; with DistributedDataParallel, its model and folder too."""

    def push(kind: str) -> dict[str, torch.Tensor]:
        options, compress = KINDS[kind]
        trainer, _ = train(trainer_factory(folder / kind), per_device_train_batch_size=2, **options)
        committed = [push_to_hub(trainer, f"{kind}-trainer", compress=compress)]
        model = trainer.accelerator.unwrap_model(trainer.model)
        if kind == "ddp":
            committed.append(push_to_hub(model, "ddp-model", compress=compress))
            committed.append(push_to_hub(folder / kind / "out", "ddp-folder"))
        else:
            with pytest.raises(ValueError, match="several processes hold parts of the model"):
                push_to_hub(model, "model")
        assert [commit is None for commit in committed] == [rank > 0] * len(committed)
        weights = Snapshot.of(model)
        return {name: weights.whole(name) for name in weights.tensors}

    with pytest.MonkeyPatch.context() as monkeypatch:
        use(url, monkeypatch, str(folder / "cache"))
        return results_in_turn(KINDS, push)


@pytest.mark.multiprocess
def test_two_processes_push_one_model(hub, tmp_path):
    first, second = on_two_processes(push_what_was_trained, tmp_path, tmp_path, hub.url)
    pushed = {name.partition("/")[2] for name in hub.files}
    assert pushed == {*(f"{kind}-trainer" for kind in KINDS), "ddp-model", "ddp-folder"}
    for kind, ours, theirs in zip(KINDS, first, second, strict=True):
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
        for name in (name for name in pushed if name.startswith(kind)):
            folder = tmp_path / name
            folder.mkdir()
            for path, content in hub.files[f"tester/{name}"].items():
                (folder / path).write_bytes(content)
            found = LlamaForCausalLM.from_pretrained(folder).state_dict()
            assert all(torch.equal(found[key], tensor) for key, tensor in ours.items())
            assert sum(int((tensor == 0).sum()) for tensor in found.values()) >= round(0.8 * 4608)


def test_a_folder_is_pushed_as_it_is_without_checkpoints(hub, tmp_path):
    folder = tmp_path / "mine"
    save_pretrained(pruned(), folder)
    (folder / "checkpoint-3").mkdir()
    for name in ("checkpoint-3/model.safetensors", ".secret", "notes.txt"):
        (folder / name).write_text("x")
    push_to_hub(folder)
    assert set(hub.files["tester/mine"]) == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "notes.txt",
    }  # fmt: skip
    assert hub.files["tester/mine"]["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    push_to_hub(str(folder), "other")
    mine, other = (dict(hub.files[f"tester/{name}"]) for name in ("mine", "other"))
    assert b'from_pretrained("tester/mine")' in mine.pop("README.md")
    assert b'from_pretrained("tester/other")' in other.pop("README.md")
    assert mine == other


def test_pushing_again_replaces_the_earlier_model(hub, tmp_path):
    push_to_hub(pruned(), "mine", config=CONFIG, history=PruningHistory())
    other = build("llama")
    push_to_hub(other, "mine", max_shard_size="10KB")
    files = hub.files["tester/mine"]
    assert "model.safetensors.index.json" in files
    assert not {"model.safetensors", "pruning_config.json", "pruning_history.json"} & set(files)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path)), logits(other))


def test_what_may_hold_secrets_is_not_uploaded(hub, make_trainer, tmp_path):
    trainer, _ = train(make_trainer, hub_token=TOKEN, save_strategy="steps", save_steps=3)
    trainer.save_model()
    for name in ("sub/.env", "run/checkpoint-1/optimizer.pt"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("x")
    assert (tmp_path / "out" / "training_args.bin").is_file()
    push_to_hub(trainer, "mine")
    files = hub.files["tester/mine"]
    assert not [name for name in files if "checkpoint" in name or ".env" in name or name.endswith(".bin")]
    assert not [name for name, content in files.items() if TOKEN.encode() in content]


# From a trainer


def test_push_to_hub_of_a_trainer(hub, make_trainer, tmp_path):
    trainer, _ = train(make_trainer)
    metrics = {"test_loss": 3.25, "dense_test_loss": 3.125, "test_runtime": 9.0}
    commit = push_to_hub(trainer, "a-model", metrics=metrics)
    files = hub.files["tester/a-model"]
    assert commit.oid == hub.sha("tester/a-model")
    assert {"pruning_config.json", "pruning_history.json", "pruning.png", "README.md"} < set(files)
    # The numbers of the card are those of the history.
    history = PruningHistory.load(tmp_path / "out" / "pruning_history.json")
    text = files["README.md"].decode()
    for row in history:
        values = [f"{value:.4f}" for value in (row.asked, row.reached, row.after_cut, row.best, row.last)]
        assert f"| {row.round} | {row.step} | {' | '.join(values)} | {row.ended} |" in text
    assert f"| dense |  |  |  | {history.dense:.4f} |" in text
    assert f"| eval_loss (validation) | {history.dense:.4f} | {history[-1].last:.4f} |" in text
    assert "| loss (test) | 3.1250 | 3.2500 |" in text
    assert "3,686 of 4,608 targeted weights are zero (79.99%)" in text
    assert "ms of a forward pass (CPU)" in text
    assert "Zeros alone make nothing faster or smaller" in text
    assert 'LlamaForCausalLM.from_pretrained("tester/a-model")' in text
    card = ModelCard(text)
    assert card.data.tags == ["hf_prune", "pruning"]
    assert card.data.pipeline_tag == "text-generation"
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("loss", 3.25, "test")
    assert card.data.model_name == "a-model"


def test_without_test_metrics_the_card_has_those_of_the_history(hub, make_trainer):
    trainer, history = train(make_trainer)
    push_to_hub(trainer, "a-model", dataset="user/data", base_model="user/base")
    card = ModelCard(hub.files["tester/a-model"]["README.md"].decode())
    (result,) = card.data.eval_results
    assert (result.metric_type, result.dataset_split) == ("loss", "validation")
    assert result.metric_value == history[-1].last
    assert (card.data.datasets, card.data.base_model) == ("user/data", "user/base")


def test_the_best_model_that_trainer_brings_back_is_the_one_that_is_told_of(hub, make_trainer):
    trainer, _ = train(make_trainer, load_best_model_at_end=True, save_strategy="steps", save_steps=1)
    push_to_hub(trainer, "a-model")
    (result,) = ModelCard(hub.files["tester/a-model"]["README.md"].decode()).data.eval_results
    assert result.metric_value == trainer.state.best_metric


def test_what_was_shrunk_is_told_with_what_it_saves(hub, make_trainer):
    config = PruningConfig(sparsity=0.5, granularity="neuron", multiple_of=4)
    trainer, history = train(make_trainer, config, build_of_structures("llama"))
    push_to_hub(trainer, "smaller")
    costs = history.costs
    text = hub.files["tester/smaller"]["README.md"].decode()
    assert f"| parameters | {costs['masked'].parameters:,} | {costs['shrunk'].parameters:,} |" in text
    assert "pruned with hf_prune: 50.0% of its neurons were removed" in text
    assert "Pruned structures were removed" in text


def test_trainers_own_push_has_weights_rounds_plot_and_tags(hub, make_trainer, tmp_path):
    trainer, _ = train(make_trainer, push_to_hub=True, hub_model_id="tester/own", save_strategy="steps", save_steps=2)
    trainer.push_to_hub()
    files = hub.files["tester/own"]
    assert {"pruning_config.json", "pruning_history.json", "pruning.png", "model.safetensors"} < set(files)
    assert set(ModelCard(files["README.md"].decode()).data.tags) >= {"hf_prune", "pruning"}
    (tmp_path / "read").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "read" / name).write_bytes(files[name])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "read")
    assert hf_prune.sparsity_report(model).zeros == round(0.8 * 4608)
    assert json.loads(files["pruning_history.json"])["rounds"][-1]["reached"] == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize(("given", "asked"), [(None, True), (False, False)])
def test_a_private_repository_stays_private(given, asked, hub, make_trainer):
    trainer, _ = train(make_trainer, hub_private_repo=True)
    push_to_hub(trainer, "mine", private=given)
    assert hub.private["tester/mine"] == asked


def test_several_evaluation_datasets(hub, make_trainer):
    model = build("llama")
    datasets = {"train_dataset": batch(model, 24), "eval_dataset": {"a": batch(model, 8)}}
    trainer, _ = train(make_trainer, model=model, **datasets, metric_for_best_model="a_loss")
    push_to_hub(trainer, "mine")
    assert "ms of a forward pass" not in hub.files["tester/mine"]["README.md"].decode()


# What goes wrong


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuse(status: int, where: str):
    return lambda method, path: status if where in path else None


@pytest.mark.parametrize(
    ("fault", "lfs"),
    [
        (refuse(500, "/commit/"), False),
        (refuse(403, "/commit/"), True),
        (refuse(0, "/commit/"), False),
        (refuse(0, "/preupload/"), False),
        (refuse(507, "/large/"), True),
        (refuse(403, "/repos/create"), False),
    ],
)
def test_a_push_that_fails_leaves_all_files_and_says_what_to_do(fault, lfs, hub, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    folder = tmp_path / "mine"
    save_pretrained(pruned(), folder)
    before, hub.fault, hub.lfs = files_in(folder), fault, lfs
    with caplog.at_level(logging.ERROR, "hf_prune"), pytest.raises(Exception, match=r".") as caught:
        push_to_hub(folder, "tester/mine", token=TOKEN)
    assert not isinstance(caught.value, (AssertionError, AttributeError, KeyError, TypeError))
    assert f"hf_prune.push_to_hub('{folder}', 'tester/mine')" in caplog.text
    assert TOKEN not in caplog.text + str(caught.value)
    after = files_in(folder)
    # Where the repository was made, the card already says by which name the model is loaded from there.
    assert {**after, "README.md": b""} == {**before, "README.md": b""}
    assert after["README.md"].startswith(b"---\nlibrary_name: transformers")
    hub.fault = lambda method, path: None
    push_to_hub(folder, "tester/mine")  # as it says
    assert hub.files["tester/mine"]["model.safetensors"] == before["model.safetensors"]


def test_a_model_that_cannot_be_pushed_stays_where_it_was_saved(hub, caplog):
    model = pruned()
    with caplog.at_level(logging.ERROR, "hf_prune"), pytest.raises(HfHubHTTPError, match="403"):
        push_to_hub(model, "somebody-else/model")
    folder = caplog.records[-1].args[2]
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(folder)), logits(model))


def test_without_a_token(hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    save_pretrained(pruned(), tmp_path / "mine")
    with pytest.raises(HfHubHTTPError, match="401"):
        push_to_hub(tmp_path / "mine", token=False)


def test_adapters_are_refused(hub, tmp_path):
    base = pruned()
    save_pretrained(base, tmp_path)
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match="carries adapters, beside which no base weights would be saved"):
        save_pretrained(with_adapter(base), tmp_path)
    with pytest.raises(ValueError, match="carries adapters"):
        push_to_hub(with_adapter(base), "mine")
    assert files_in(tmp_path) == before
    assert hub.files == {}


@pytest.mark.parametrize("repo_id", ["a b", "a/b/c", "../up", "-x"])
def test_names_that_the_hub_does_not_allow(repo_id, hub, tmp_path):
    with pytest.raises(HFValidationError, match=r"."):
        push_to_hub(pruned(), repo_id)
    assert hub.requests == []


def test_nothing_to_push(hub, tmp_path):
    with pytest.raises(ValueError, match=r"is not a saved model: it has no config\.json"):
        push_to_hub(tmp_path)
    with pytest.raises(ValueError, match="repo_id must be given"):
        push_to_hub(pruned())


@pytest.mark.parametrize("compress", [True, False])
def test_saving_that_fails_leaves_the_folder_as_it_was(compress, tmp_path, monkeypatch):
    model = pruned()
    save_pretrained(model, tmp_path, compress=compress)
    before, config = files_in(tmp_path), model.config.to_dict()

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(ModelCard, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        save_pretrained(build("llama"), tmp_path, compress=compress, config=CONFIG)
    assert files_in(tmp_path) == before
    assert model.config.to_dict() == config


@pytest.mark.parametrize("compress", [True, False])
def test_a_disk_that_is_full_in_the_middle_of_the_weights(compress, tmp_path):
    model = pruned()
    save_pretrained(model, tmp_path, compress=compress, config=CONFIG)
    before = files_in(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # So that writing is an error, as on a full disk.
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        with pytest.raises(OSError, match=r"the weights could not be written, and .* is as it was: .*too large"):
            save_pretrained(build("llama"), tmp_path, compress=compress, config=CONFIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert files_in(tmp_path) == before


def test_files_of_an_earlier_model_are_replaced(tmp_path):
    model = pruned()
    save_pretrained(model, tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    mine = ["model_ema.safetensors", "notes.txt"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    save_pretrained(model, tmp_path)
    assert sorted(files_in(tmp_path)) == sorted(
        ["README.md", "config.json", "generation_config.json", "model.safetensors", *mine]
    )
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"compressed": {"../../etc/passwd": [3]}}, None),  # of no tensor, and no file
        ({"compressed": {"lm_head.weight": "3"}}, "positive whole numbers"),
        ({"shapes": {"lm_head.weight": [-1, 2]}}, "positive whole numbers"),
        ({"shapes": {}, "run": "import os"}, "unknown key run"),
    ],
)
def test_hostile_records(record, message, tmp_path):
    model = pruned()
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hf_prune", **record}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    before = files_in(tmp_path)
    if message is None:
        assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "model")), logits(model))
    else:
        with pytest.raises(ValueError, match=message):
            LlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert files_in(tmp_path) == before
