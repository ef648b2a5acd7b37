"""What earlier versions have written is resumed and loaded.

The files in `tests/data` were written by this script, run with the version that their folder is named after, in its
last state in which all modules lay in one folder: `python tests/test_earlier_versions.py tests/data/0.1.0`.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_prune import MaskSet, PruningConfig, PruningHistory, PruningTrainerCallback, prune, save_pretrained, shrink

WRITTEN = Path(__file__).parent / "data" / "0.1.0"
STEPS, SAVED = 12, 7
IDS = torch.arange(24).view(4, 6) % 16


def train(output: Path, resume_from: Path | None = None) -> tuple[Trainer, PruningTrainerCallback]:
    """A run with patience that has all that there is to resume: masks, best weights, movement and moments."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    samples = [{"input_ids": row, "labels": row} for row in torch.randint(16, (24, 6))]
    config = PruningConfig(
        sparsity=0.8, schedule="geometric", rounds=3, criterion="movement", begin=2, end=10, patience=2,
        min_round_steps=2, restart_lr=True,
    )  # fmt: skip
    pruning = PruningTrainerCallback(config)
    args = TrainingArguments(
        str(output), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=0.3, eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=SAVED, use_cpu=True, report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False, logging_strategy="no",
        resume_from_checkpoint=None if resume_from is None else str(resume_from),
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=samples, eval_dataset=samples[:4], callbacks=[pruning])
    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    return trainer, pruning


def llama() -> LlamaForCausalLM:
    """A pruned Llama, whose layers have lost other numbers of neurons."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, vocab_size=16)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    prune(model, PruningConfig(sparsity=0.4, granularity="head+neuron", multiple_of=2))
    return model


def write(folder: Path) -> None:
    trainer, pruning = train(folder / "run")
    shutil.move(folder / "run" / f"checkpoint-{SAVED}", folder / "checkpoint")
    shutil.rmtree(folder / "run")
    (folder / "checkpoint" / "training_args.bin").unlink()
    trainer.model.save_pretrained(folder / "end")
    pruning.masks.save(folder / "end" / "masks.safetensors")
    pruning.history.save(folder / "end" / "pruning_history.json")
    model = llama()
    expected = model(IDS).logits
    save_pretrained(model, folder / "compressed", compress=True)
    save_pretrained(shrink(model), folder / "shrunk")
    for name in ("compressed", "shrunk"):
        (folder / name / "README.md").unlink()  # It names the command, and the machine.
    torch.save(expected.detach(), folder / "logits.pt")


def test_a_checkpoint_is_resumed_to_the_end_that_it_had(tmp_path):
    checkpoint = tmp_path / f"checkpoint-{SAVED}"
    shutil.copytree(WRITTEN / "checkpoint", checkpoint)
    trainer, pruning = train(tmp_path, resume_from=checkpoint)
    assert pruning.masks == MaskSet.load(WRITTEN / "end" / "masks.safetensors")
    history = PruningHistory.load(WRITTEN / "end" / "pruning_history.json")
    for row, before in zip(pruning.history, history, strict=True):
        assert (row.step, row.asked, row.masked, row.ended) == (before.step, before.asked, before.masked, before.ended)
    written = load_file(WRITTEN / "end" / "model.safetensors")
    undisturbed = dict(train(tmp_path / "undisturbed")[0].model.named_parameters())
    # To the last bit on machines that round as the one did where they were written.
    exact = all(torch.equal(undisturbed[name], weight) for name, weight in written.items())
    tolerance = dict(rtol=0, atol=0) if exact else dict(rtol=1e-2, atol=1e-3)
    resumed = dict(trainer.model.named_parameters())
    for name, weight in written.items():
        torch.testing.assert_close(resumed[name].detach(), weight, **tolerance)


def test_folders_are_loaded():
    expected = torch.load(WRITTEN / "logits.pt", weights_only=True)
    for name in ("shrunk", "compressed"):
        model = LlamaForCausalLM.from_pretrained(WRITTEN / name)
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
