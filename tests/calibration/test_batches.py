"""Batches whose samples do not lie along the first dimension say the same as their samples one by one."""

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import DataCollatorWithFlattening

from hf_prune import MaskSet, PruningConfig, PruningTrainerCallback, prune
from hf_prune.calibration.batches import placeholders_of, singles_of, size_of, take_samples, unpacked
from hf_prune.calibration.statistics import STATISTICS, calibrate
from hf_prune.weights.targets import find_targets
from tests.tiny import TEXT, build
from tests.trainers import trainer_factory

IMAGE, VIDEO = 50, 51


def assert_same(found, expected):
    for name, values in expected.items():
        for key, value in values.items():
            assert value.any()
            assert (found[name][key] - value).norm() <= 1e-4 * value.norm(), (name, key)


def masks_of(model, data, **options):
    model = copy.deepcopy(model)
    prune(model, PruningConfig(sparsity=0.5, **options), data)
    return MaskSet.from_zeros(model).digest()


# How many samples there are


def test_the_number_of_samples_depends_on_no_order():
    batch = {"pixel_values": torch.ones(32, 3), "position_ids": torch.ones(3, 2, 8), "input_ids": torch.ones(2, 8)}
    assert size_of(batch) == size_of(dict(reversed(batch.items()))) == 2
    assert size_of({"scale": torch.tensor(1.0), "x": torch.ones(4, 2)}) == 4


def test_what_all_samples_share_stays_whole_and_positions_of_three_axes_are_cut():
    shared = {"positions": torch.arange(8)[None], "weights": torch.ones(5), "temperature": torch.tensor(2.0)}
    batch = {"position_ids": torch.arange(48).view(3, 2, 8), "input_ids": torch.ones(2, 8), **shared}
    first = take_samples(batch, slice(0, 1))
    assert torch.equal(first["position_ids"], batch["position_ids"][:, :1])
    assert all(first[name] is value for name, value in shared.items())
    assert take_samples(batch, slice(0, 3)) is batch
    assert torch.equal(take_samples(batch, torch.tensor([1, 0]))["position_ids"], batch["position_ids"].flip(1))


def test_rows_that_cannot_be_told_apart_are_an_error_only_where_they_must_be():
    class Sees(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, input_ids, patches):
            return {"loss": self.layer(patches).square().mean() * input_ids.float().mean()}

    torch.manual_seed(0)
    batch = {"patches": torch.randn(6, 4), "input_ids": torch.ones(2, 3)}
    assert prune(Sees(), PruningConfig(sparsity=0.5, criterion="wanda"), [batch, batch]).sparsity == 0.5
    whole = PruningConfig(sparsity=0.5, criterion="taylor", calibration_samples=4)
    assert prune(Sees(), whole, [batch, batch]).sparsity == 0.5
    message = r"^cannot split a batch of 2 samples: 'patches' has 6 rows, .*Give batches of one sample\.$"
    for options in ({"criterion": "wanda", "calibration_samples": 3}, {"criterion": "fisher"}):
        with pytest.raises(ValueError, match=message):
            prune(Sees(), PruningConfig(sparsity=0.5, **options), [batch, batch])


# Padding-free batches

LENGTHS = (5, 3, 7, 2, 6)


def sequences(labelled_from=2):
    torch.manual_seed(0)
    rows = [{"input_ids": torch.randint(1, 60, (length,))} for length in LENGTHS]
    for i, row in enumerate(rows):
        row["labels"] = row["input_ids"].clone()
        row["labels"][: labelled_from if i % 2 else 1] = -100
    return rows


def one_by_one(rows):
    return [{name: value[None] for name, value in row.items()} for row in rows]


COLLATORS = {
    "positions": {},
    "positions from two on": {"position_ids_start": 2},
    "boundaries": {"return_position_ids": False, "return_flash_attn_kwargs": True},
    "numbers": {"return_position_ids": False, "return_seq_idx": True},
    "everything": {"return_flash_attn_kwargs": True, "return_seq_idx": True},
}


@pytest.mark.parametrize("how", COLLATORS)
def test_sequences_in_a_single_row_are_samples(how):
    rows = sequences()
    batch = DataCollatorWithFlattening(return_tensors="pt", **COLLATORS[how])(rows)
    parts = unpacked({**batch, "inputs_embeds": batch["input_ids"][..., None], "rewards": torch.arange(5)}, {})
    assert [size_of(part) for part in parts] == [1] * len(rows)
    for i, (part, row) in enumerate(zip(parts, rows, strict=True)):
        assert torch.equal(part["input_ids"][0], row["input_ids"])
        assert torch.equal(part["inputs_embeds"][0, :, 0], row["input_ids"])
        assert torch.equal(part["labels"][0, 1:], row["labels"][1:])
        assert part["rewards"].tolist() == [i]
        assert part.keys() <= {"input_ids", "inputs_embeds", "labels", "position_ids", "rewards"}


def test_what_is_no_padding_free_batch_is_left_alone():
    ids = torch.ones(1, 6, dtype=torch.long)
    restarting, other = torch.tensor([[0, 1, 2, 0, 1, 2]]), torch.tensor([[0, 1, 2, 7, 8, 2]])
    for batch in (
        {"input_ids": ids},
        {"input_ids": ids, "position_ids": torch.arange(6)[None]},
        {"input_ids": ids, "position_ids": other},
        {"input_ids": ids, "position_ids": restarting, "attention_mask": torch.ones(1, 6)},
        {"input_ids": ids.repeat(2, 1), "position_ids": restarting.repeat(2, 1)},
        {"pixel_values": torch.ones(1, 3, 8, 8), "position_ids": restarting},
    ):
        assert unpacked(batch, {}) == [batch]


def test_what_pads_a_row_is_no_sample():
    trl = pytest.importorskip("trl.trainer.sft_trainer")
    collate = trl.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True, pad_to_multiple_of=32)
    rows = [{name: value.tolist() for name, value in row.items()} for row in sequences()]
    batch = collate(rows)
    assert batch["input_ids"].shape == (1, 32)
    assert [part["input_ids"][0].tolist() for part in unpacked(batch, {})] == [row["input_ids"] for row in rows]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padding_free_batches_say_what_their_sequences_say(family):
    model, rows = build(family), sequences()
    batches = [DataCollatorWithFlattening(return_tensors="pt")(part) for part in (rows[:3], rows[3:])]
    targets = find_targets(model)
    found = calibrate(model, targets, batches, STATISTICS, 4)  # The second batch is cut short.
    assert_same(found, calibrate(model, targets, one_by_one(rows)[:4], STATISTICS, 4))
    options = {"criterion": "sparsegpt", "scope": "layer", "calibration_samples": 4}
    assert masks_of(model, batches, **options) == masks_of(model, one_by_one(rows), **options)


def test_in_training_sequences_are_counted(tmp_path, caplog):
    rows, digests = sequences() * 2, []
    for collator in (DataCollatorWithFlattening(), None):
        config = PruningConfig(sparsity=0.5, criterion="fisher", schedule="one_shot", calibration_samples=7)
        pruning = PruningTrainerCallback(config)
        options = {"train_dataset": rows, "max_steps": 1, "per_device_train_batch_size": 3 if collator else 1}
        trainer = trainer_factory(tmp_path)(build("llama"), pruning, **options)
        if collator:
            trainer.data_collator = collator
        trainer.train()
        digests.append(pruning.masks.digest())
    assert digests[0] == digests[1]
    assert "fewer than" not in caplog.text


# Images


def qwen():
    text = {
        **TEXT,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    }
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16, "patch_size": 2,
        "spatial_merge_size": 2, "temporal_patch_size": 1, "fullatt_block_indexes": [0], "window_size": 8,
    }  # fmt: skip
    tokens = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 52, "vision_end_token_id": 53}
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    )


def llava():
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=8, patch_size=4),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def ids_of(images, token=IMAGE):
    """Text with images of some numbers of tokens."""
    ids = torch.full((12,), 7)
    at = 1
    for tokens in images:
        ids[at : at + tokens] = token
        at += tokens + 1
    return ids


# The grids of the images, or the images, of each sample.
GRIDS = {"one each": [[4], [4]], "one of other sizes": [[4], [2]], "several": [[2, 4], [2]], "text": [[2, 2], [], [4]]}


def patches(case, kind="image"):
    """A batch for Qwen, and its samples."""
    torch.manual_seed(0)
    pixels = {"image": "pixel_values", "video": "pixel_values_videos"}[kind]
    singles = []
    for widths in GRIDS[case]:
        ids = ids_of([width // 2 for width in widths], IMAGE if kind == "image" else VIDEO)[None]
        kinds = ((ids == IMAGE) + 2 * (ids == VIDEO)).int()
        single = {"input_ids": ids, "labels": ids, "mm_token_type_ids": kinds}
        if widths:
            single[pixels] = torch.randn(sum(2 * width for width in widths), 12)
            single[f"{kind}_grid_thw"] = torch.tensor([[1, 2, width] for width in widths])
        if widths and kind == "video":
            single["second_per_grid_ts"] = torch.ones(len(widths))
        singles.append(single)
    return together(singles), singles


def images(case):
    """A batch for LLaVA, and its samples."""
    torch.manual_seed(0)
    singles = []
    for each in GRIDS[case]:
        ids = ids_of([4] * len(each))[None]
        singles.append({"input_ids": ids, "labels": ids})
        if each:
            singles[-1]["pixel_values"] = torch.randn(len(each), 3, 8, 8)
    return together(singles), singles


def together(singles):
    names = dict.fromkeys(name for single in reversed(singles) for name in reversed(single))  # Pixels come first.
    return {name: torch.cat([single[name] for single in singles if name in single]) for name in names}


BATCHES = {
    **{f"qwen, {case}": (qwen, lambda case=case: patches(case)) for case in GRIDS},
    "qwen, videos": (qwen, lambda: patches("several", "video")),
    **{f"llava, {case}": (llava, lambda case=case: images(case)) for case in ("one each", "several", "text")},
}


@pytest.mark.parametrize("name", BATCHES)
def test_each_sample_gets_its_images(name):
    make, batches = BATCHES[name]
    batch, singles = batches()
    with torch.device("meta"):
        placeholders = placeholders_of(make())
    assert placeholders["image"] == IMAGE
    parts = [part for each in unpacked(batch, placeholders) for part in singles_of(each)]
    for part, single in zip(parts, singles, strict=True):
        assert part.keys() == single.keys()
        assert all(torch.equal(part[key], value) for key, value in single.items())


@pytest.mark.parametrize("name", ["qwen, several", "llava, text"])
def test_batches_with_images_say_what_their_samples_say(name):
    make, batches = BATCHES[name]
    torch.manual_seed(0)
    model, (batch, singles) = make(), batches()
    targets, samples = find_targets(model), len(singles)
    expected = calibrate(model, targets, singles, STATISTICS, samples)
    assert_same(calibrate(model, targets, [batch], STATISTICS, samples), expected)
    options = {"criterion": "sparsegpt", "scope": "layer", "calibration_samples": samples - 1}
    assert masks_of(model, [batch], **options) == masks_of(model, singles, **options)


def test_images_of_other_sizes_are_not_guessed_by_their_tokens():
    ids = torch.stack([ids_of([1, 3]), ids_of([2])])
    batch = {"input_ids": ids, "pixel_values": torch.ones(3, 3, 8, 8), "image_sizes": torch.tensor([[1], [3], [2]])}
    assert unpacked(batch, {"image": IMAGE}) == [batch]
    with pytest.raises(ValueError, match="'pixel_values' has 3 rows"):
        take_samples(batch, slice(0, 1))


def test_in_training_patches_are_those_of_their_samples(tmp_path):
    """The collator makes batches of one sample where batches of several could not be cut."""
    _, singles = patches("one each")
    torch.manual_seed(0)
    model, digests, sizes = qwen(), [], []

    def collate(rows):
        sizes.append(len(rows))
        return together(rows)

    for batch_size in (2, 1):
        config = PruningConfig(sparsity=0.5, criterion="fisher", schedule="one_shot", calibration_samples=3)
        pruning = PruningTrainerCallback(config)
        options = {"train_dataset": singles * 2, "max_steps": 1, "per_device_train_batch_size": batch_size}
        trainer = trainer_factory(tmp_path)(copy.deepcopy(model), pruning, remove_unused_columns=False, **options)
        trainer.data_collator = collate
        trainer.train()
        digests.append(pruning.masks.digest())
    assert digests[0] == digests[1]
    assert sizes[-4:] == [1] * 4
