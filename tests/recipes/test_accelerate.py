"""Recipes on several processes, by the configs in `recipes/accelerate`."""

import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from transformers import GPTNeoForCausalLM

from hf_prune import sparsity_report
from tests.recipes.conftest import RECIPES
from tests.recipes.launch import ROUND, begin, finished, launch, report_in

CONFIGS = sorted(path.name for path in (RECIPES / "accelerate").iterdir())
SHORT = ["--num_stories=200", "--dense_steps=4", "--max_steps=20", "--block_size=32"]


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_start_several_processes_and_are_on_the_page(name: str) -> None:
    config = load_config_from_file(str(RECIPES / "accelerate" / name))
    assert config.num_processes == 2
    assert not config.use_cpu  # With which one process would be started.
    lines = re.findall(rf"^accelerate launch --config_file recipes/accelerate/{name} .*recipes/\w+\.py",
                       (RECIPES / "README.md").read_text(encoding="utf-8"), re.MULTILINE)  # fmt: skip
    assert lines


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_and_two_machines(tmp_path: Path) -> None:
    printed = launch("tinystories.py", tmp_path, *SHORT, config=["cpu.yaml"])
    assert printed.count("Dense model: trained for 4 steps") == 1
    assert len(ROUND.findall(printed)) == 5
    assert "Trained by 2 processes, DistributedDataParallel over gloo." in printed
    assert printed.count("Test perplexity") == printed.count("Story after") == 1
    machines = [
        begin(
            [str(RECIPES / "tinystories.py")], tmp_path, *SHORT, "--output_dir=again",
            config=["two_machines.yaml", f"--machine_rank={rank}", "--main_process_port=29511"],
        )
        for rank in range(2)
    ]  # fmt: skip
    for printed_again in map(finished, machines):
        assert printed_again.count("Dense model: found in dense/gpt_neo-") == 1
        assert report_in(printed_again, "again") == report_in(printed, "output/tinystories")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_fsdp2_in_bfloat16(tmp_path: Path) -> None:
    flags = [*SHORT, "--criterion=fisher", "--calibration_samples=11", "--output_dir=shards"]
    process = begin(["-m", "tests.recipes.on_cpu", "tinystories.py"], tmp_path, *flags, config=["fsdp2.yaml"])
    printed = finished(process)
    assert len(ROUND.findall(printed)) == 5
    assert "Trained by 2 processes, FSDP over gloo." in printed
    assert 'Load it with GPTNeoForCausalLM.from_pretrained("shards").' in printed
    model = GPTNeoForCausalLM.from_pretrained(tmp_path / "shards")
    assert sparsity_report(model).sparsity == pytest.approx(0.9, abs=1e-6)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("config", ["zero2.yaml", "zero3.yaml"])
def test_deepspeed_in_bfloat16(config: str, tmp_path: Path) -> None:
    flags = [*SHORT, "--bf16", "--output_dir=zero"]
    process = begin([str(RECIPES / "tinystories.py")], tmp_path, *flags, config=[config])
    printed = finished(process)
    assert len(ROUND.findall(printed)) == 5
    assert "Trained by 2 processes, DeepSpeed over gloo." in printed
    model = GPTNeoForCausalLM.from_pretrained(tmp_path / "zero")
    assert sparsity_report(model).sparsity == pytest.approx(0.9, abs=1e-6)
