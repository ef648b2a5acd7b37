import dataclasses
import inspect
import json
import math
import re
from pathlib import Path

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_prune.config import CONFIG_NAME, OPTIMIZER_STATES, RESTORE, PruningConfig
from hf_prune.schedules import SCHEDULES, resolve
from hf_prune.scopes import SCOPES
from hf_prune.selection.scoring import WITH_AUTO

FIELDS = dataclasses.fields(PruningConfig)

# Command line → the fields it sets. Together they set every field.
COMMANDS = [
    ("--sparsity 0.8", {"sparsity": 0.8}),
    ("--sparsity 0", {"sparsity": 0.0}),
    ("--keep_parameters 0.7 --granularity neuron", {"keep_parameters": 0.7, "granularity": "neuron"}),
    ("--keep_flops 0.7 --granularity head", {"keep_flops": 0.7, "granularity": "head"}),
    ("--keep_latency 1 --granularity layer", {"keep_latency": 1.0, "granularity": "layer"}),
    ("--sparsity 0.9 --schedule geometric --rounds 4", {"sparsity": 0.9, "schedule": "geometric", "rounds": 4}),
    ("--sparsity 0.9 --initial_sparsity 0.5", {"sparsity": 0.9, "initial_sparsity": 0.5}),
    ("--sparsities 0.5 0.75 0.875", {"sparsities": [0.5, 0.75, 0.875]}),
    ("--sparsities 0.5", {"sparsities": [0.5]}),
    ("--sparsity 0.5 --criterion random", {"sparsity": 0.5, "criterion": "random"}),
    (
        "--sparsity 0.5 --criterion taylor --calibration_samples 64 --score_steps 4",
        {"sparsity": 0.5, "criterion": "taylor", "calibration_samples": 64, "score_steps": 4},
    ),
    ("--granularity 2:4", {"granularity": "2:4"}),
    (
        "--sparsity 0.5 --granularity block:4x4 --scope erk",
        {"sparsity": 0.5, "granularity": "block:4x4", "scope": "erk"},
    ),
    (
        ["--sparsity", "0.5", "--layer_sparsity", r'{".*\\.mlp\\..*": 0.9, "h\\.0\\..*": 0}'],
        {"sparsity": 0.5, "layer_sparsity": {r".*\.mlp\..*": 0.9, r"h\.0\..*": 0}},
    ),
    ("--sparsity 0.5 --target_modules q_proj v_proj", {"sparsity": 0.5, "target_modules": ["q_proj", "v_proj"]}),
    (
        ["--sparsity", "0.5", "--target_modules", r".*\.(q|v)_proj"],
        {"sparsity": 0.5, "target_modules": [r".*\.(q|v)_proj"]},
    ),
    (
        ["--sparsity", "0.5", "--exclude_modules", r"h\.0\..*", "lm_head"],
        {"sparsity": 0.5, "exclude_modules": [r"h\.0\..*", "lm_head"]},
    ),
    ("--sparsity 0.5 --begin 0.1 --end 0.75", {"sparsity": 0.5, "begin": 0.1, "end": 0.75}),
    ("--sparsity 0.5 --begin 10 --end 500", {"sparsity": 0.5, "begin": 10.0, "end": 500.0}),
    ("--sparsity 0.5 --metric accuracy", {"sparsity": 0.5, "metric": "accuracy"}),
    ("--sparsity 0.9 --patience 3", {"sparsity": 0.9, "patience": [3]}),
    (
        "--sparsity 0.9 --rounds 3 --patience 2 3 --max_round_steps 9 --min_round_steps 4",
        {"sparsity": 0.9, "rounds": 3, "patience": [2, 3], "max_round_steps": 9, "min_round_steps": 4},
    ),
    (
        "--sparsity 0.5 --patience 3 --min_delta 0.01 --restore last",
        {"sparsity": 0.5, "patience": [3], "min_delta": 0.01, "restore": "last"},
    ),
    (
        "--sparsity 0.5 --restart_lr --optimizer_state reset",
        {"sparsity": 0.5, "restart_lr": True, "optimizer_state": "reset"},
    ),
    ("--hold_zeros", {"hold_zeros": True}),
    (
        "--sparsity 0.5 --granularity neuron --multiple_of 16 --shrink_at_end false --uniform",
        {"sparsity": 0.5, "granularity": "neuron", "multiple_of": 16, "shrink_at_end": False, "uniform": True},
    ),
    (
        "--sparsity 0.5 --granularity head+neuron --no_shrink_at_end",
        {"sparsity": 0.5, "granularity": "head+neuron", "shrink_at_end": False},
    ),
    (
        "--sparsity 0.5 --granularity neuron --reconstruct",
        {"sparsity": 0.5, "granularity": "neuron", "reconstruct": True},
    ),
    ("--hold_zeros false --sparsity 0.5", {"hold_zeros": False, "sparsity": 0.5}),
]


def arguments(command):
    return command if isinstance(command, list) else command.split()


CASES = pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(arguments(command[0])))

# Configs that no command line gives: a lone regular expression is a string, and a dict is a dict.
OTHERS = [
    {"sparsity": 0.5, "target_modules": r".*\.mlp\..*", "exclude_modules": "lm_head|score"},
    {"sparsity": 0.5, "target_modules": []},
    {"sparsity": 0.5, "layer_sparsity": {".*": 0.25}},
    {"sparsity": 0.5, "layer_sparsity": {}},
    {"sparsity": 0.5, "layer_sparsity": '{".*": 0.25}'},
    {"sparsity": 0.5, "metric": "ünïcode"},
    {"sparsity": 0.5, "patience": 3},
]


# Every field, through the command line and back, and through JSON and back


def test_the_cases_set_every_field():
    assert {name for _, values in COMMANDS for name in values} == {field.name for field in FIELDS}


@CASES
def test_a_config_is_read_from_the_command_line(command, tmp_path):
    text, values = command
    parser = HfArgumentParser((PruningConfig, TrainingArguments))
    argv = [*arguments(text), "--output_dir", str(tmp_path), "--report_to", "none", "--use_cpu"]
    config, training = parser.parse_args_into_dataclasses(args=argv)
    assert config == PruningConfig(**values)
    assert config.to_dict() == PruningConfig(**values).to_dict()
    assert {name: getattr(config, name) for name in values} == values
    assert training.output_dir == str(tmp_path)


@CASES
def test_a_config_is_read_from_a_dict_and_from_json_as_the_recipes_take_it(command, tmp_path):
    _, values = command
    parser = HfArgumentParser(PruningConfig)
    (tmp_path / "arguments.json").write_text(json.dumps(values))
    assert parser.parse_dict(values) == (PruningConfig(**values),)
    assert parser.parse_json_file(str(tmp_path / "arguments.json")) == (PruningConfig(**values),)


@pytest.mark.parametrize("values", [values for _, values in COMMANDS] + OTHERS, ids=str)
def test_a_config_comes_back_from_json_and_from_disk(values, tmp_path):
    config = PruningConfig(**values)
    assert PruningConfig.from_dict(config.to_dict()) == config
    assert PruningConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    folder = tmp_path / "a" / "new" / "folder"
    config.save_pretrained(folder)
    config.save_pretrained(str(folder))  # Once more, over the first.
    loaded = PruningConfig.from_pretrained(str(folder))
    assert loaded == config
    assert loaded.to_dict() == config.to_dict()
    assert loaded.round_sparsities == config.round_sparsities
    assert [path.name for path in folder.iterdir()] == ["pruning_config.json"]


def test_a_saved_config_holds_every_field_and_nothing_else():
    values = PruningConfig(sparsity=0.5).to_dict()
    assert list(values) == [field.name for field in FIELDS]
    assert values["sparsity"] == 0.5
    assert values["layer_sparsity"] is values["end"] is None


def test_a_tuple_is_as_good_as_a_list(tmp_path):
    """Else a config is not equal to itself after JSON, and a run could not be resumed."""
    config = PruningConfig(sparsities=(0.5, 0.75), target_modules=("q_proj", "v_proj"), exclude_modules=("k_proj",))
    assert config.to_dict() == json.loads(json.dumps(config.to_dict()))
    config.save_pretrained(tmp_path)
    assert PruningConfig.from_pretrained(tmp_path) == config


def test_a_config_does_not_change_with_what_it_was_made_from():
    lists = {"sparsities": [0.5, 0.75], "target_modules": ["q_proj"], "layer_sparsity": {"a": 0.5}}
    config = PruningConfig(**lists)
    before = config.to_dict()
    lists["sparsities"].append(0.9)
    lists["target_modules"].append("v_proj")
    lists["layer_sparsity"]["b"] = 0.9
    config.round_sparsities.append(0.9)
    config.to_dict()["sparsities"].append(0.9)
    config.own_sparsities["b"] = 0.9
    assert config.to_dict() == before
    assert config.round_sparsities == [0.5, 0.75]


def test_layer_sparsity_may_be_json_text():
    config = PruningConfig(sparsity=0.5, layer_sparsity='{".*mlp.*": 0.9, "head": 0}')
    assert config.own_sparsities == config.layer_sparsity == {".*mlp.*": 0.9, "head": 0}
    assert PruningConfig(sparsity=0.5).own_sparsities == {}


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_field_is_a_flag_with_help_and_is_described(field):
    assert not {field.name} & {other.name for other in dataclasses.fields(TrainingArguments)}
    assert field.metadata["help"].endswith(".")
    documented = re.findall(r"^    (\w+): ", inspect.getdoc(PruningConfig).partition("Args:")[2], flags=re.M)
    assert field.name in documented
    assert [name for name in documented if name in {f.name for f in FIELDS}] == [f.name for f in FIELDS]


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("schedule", SCHEDULES),
        ("criterion", WITH_AUTO),
        ("scope", SCOPES),
        ("restore", RESTORE),
        ("optimizer_state", OPTIMIZER_STATES),
    ],
    ids=lambda x: str(x)[:9],
)
def test_help_and_description_list_what_is_known(name, known):
    field = next(field for field in FIELDS if field.name == name)
    entry = re.search(rf"^    {name}: (.*?)(?=^    \w+: )", inspect.getdoc(PruningConfig), flags=re.M | re.S)
    open_table = {"schedule": "SCHEDULES", "criterion": "CRITERIA"}.get(name)
    for value in known:
        assert value in field.metadata["help"]
        assert (open_table or f'"{value}"') in entry.group(1)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_a_config_is_frozen(field):
    config = PruningConfig(sparsity=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError, match=field.name):
        setattr(config, field.name, None)


# The sparsity after each round


def test_a_sparsity_is_enough():
    assert PruningConfig(sparsity=0.8).round_sparsities == resolve("auto", 0.8)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_works_with_the_sparsity_alone(name):
    assert PruningConfig(sparsity=0.8, schedule=name).round_sparsities == resolve(name, 0.8)


def test_rounds_and_first_cut_reach_the_schedule():
    config = PruningConfig(sparsity=0.9, schedule="hybrid", rounds=5, initial_sparsity=0.5)
    assert config.round_sparsities == resolve("hybrid", 0.9, 5, 0.5)


def test_sparsities_are_the_rounds():
    assert PruningConfig(sparsities=[0.0, 0.5, 0.6]).round_sparsities == [0.0, 0.5, 0.6]
    assert PruningConfig(sparsities=[0.5, 0.6], sparsity=0.6).round_sparsities == [0.5, 0.6]


def test_zeros_alone_may_be_held():
    assert PruningConfig(hold_zeros=True).round_sparsities == []
    assert PruningConfig(hold_zeros=True, sparsity=0.5).round_sparsities == [0.5]


# N:M


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (1, 3), (3, 7), (5, 16), (1, 32)])
def test_a_pattern_fixes_the_sparsity(n, m):
    granularity = f"{n}:{m}"
    assert PruningConfig(granularity=granularity).round_sparsities == [(m - n) / m]
    assert PruningConfig(granularity=granularity, sparsity=1 - n / m).round_sparsities == [(m - n) / m]
    assert PruningConfig(granularity=granularity, rounds=1).round_sparsities == [(m - n) / m]
    assert PruningConfig(granularity=granularity, hold_zeros=True).round_sparsities == [(m - n) / m]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 8), (3, 7), (5, 16)])
def test_the_rounds_of_a_pattern_go_through_the_patterns_on_the_way(n, m):
    every = PruningConfig(granularity=f"{n}:{m}", rounds=m - n)
    assert every.round_sparsities == [dropped / m for dropped in range(1, m - n + 1)]
    for rounds in range(1, m - n + 1):
        dropped = [m * s for s in PruningConfig(granularity=f"{n}:{m}", rounds=rounds).round_sparsities]
        assert len(dropped) == rounds
        assert dropped == sorted({round(d) for d in dropped})
        assert dropped[0] >= 1
        assert dropped[-1] == m - n


def test_a_pattern_takes_a_schedule_or_a_list():
    assert PruningConfig(granularity="2:8", schedule="geometric", rounds=3).round_sparsities == [3 / 8, 5 / 8, 6 / 8]
    assert PruningConfig(granularity="1:4", sparsities=[0.5, 0.75]).round_sparsities == [0.5, 0.75]


def test_a_first_cut_on_the_way_to_a_pattern_means_the_hybrid():
    config = PruningConfig(granularity="2:8", initial_sparsity=0.25)
    assert config.round_sparsities == [2 / 8, 3 / 8, 5 / 8, 6 / 8]


# Bad input

FRACTION = [
    (80, r"must be in \[0, 1\), got 80\. Did you mean 0\.8\?"),
    (50.0, r"must be in \[0, 1\), got 50\.0\. Did you mean 0\.5\?"),
    (1.0, r"must be in \[0, 1\), got 1\.0\.$"),
    (1, r"must be in \[0, 1\), got 1\.$"),
    (-0.1, r"must be in \[0, 1\), got -0\.1\.$"),
    (math.nan, r"must be in \[0, 1\), got nan\.$"),
    (math.inf, r"must be in \[0, 1\), got inf\.$"),
    (-math.inf, r"must be in \[0, 1\), got -inf\.$"),
    ("0.8", r"must be a number in \[0, 1\), got '0\.8'\."),
    (True, r"must be a number in \[0, 1\), got True\."),
    ([0.8], r"must be a number in \[0, 1\), got \[0\.8\]\."),
]


@pytest.mark.parametrize(("value", "message"), FRACTION)
def test_a_sparsity_has_to_be_a_fraction(value, message):
    if "number" not in message:  # Types are checked for each field alike.
        with pytest.raises(ValueError, match=rf"^sparsity {message}"):
            PruningConfig(sparsity=value)
    with pytest.raises(ValueError, match=rf"^each of sparsities {message}"):
        PruningConfig(sparsities=[0.5, value])
    with pytest.raises(ValueError, match=rf"^layer_sparsity\['mlp'\] {message}"):
        PruningConfig(sparsity=0.5, layer_sparsity={"attn": 0.5, "mlp": value})


UNKNOWN = {
    "schedule": f"schedule must be one of {', '.join(SCHEDULES)}; got ",
    "criterion": f"criterion must be one of {', '.join(WITH_AUTO)}; got ",
    "scope": f"scope must be one of {', '.join(SCOPES)}; got ",
    "optimizer_state": r"optimizer_state must be one of mask, reset, keep; got ",
    "restore": r"restore must be one of best, last; got ",
    "granularity": r"granularity must be unstructured, N:M \(such as 2:4\), .* or .*; got ",
}


@pytest.mark.parametrize("value", ["unknown", "", "Auto", "magnitude ", "2:4:8"])
@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_name_is_an_error_that_lists_the_known(name, value):
    with pytest.raises(ValueError, match=f"^{UNKNOWN[name]}{re.escape(repr(value))}"):
        PruningConfig(**{"sparsity": 0.5, name: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        # What is missing or contradicts itself.
        (
            {},
            r"sparsity is missing\. Give a fraction in \[0, 1\), a list of sparsities, an N:M granularity, or ",
        ),
        ({"layer_sparsity": {".*": 0.5}}, r"sparsity is missing"),
        ({"schedule": "cubic"}, r"sparsity is missing"),
        ({"hold_zeros": True, "rounds": 3}, r"rounds needs a sparsity\. With hold_zeros alone, nothing is pruned\."),
        (
            {"hold_zeros": True, "schedule": "cubic", "initial_sparsity": 0.1},
            r"initial_sparsity, schedule needs a sparsity",
        ),
        ({"hold_zeros": True, "layer_sparsity": {".*": 0.5}}, r"layer_sparsity needs a sparsity"),
        # Schedules.
        ({"sparsity": 0.8, "rounds": 0}, r"rounds must be at least 1, got 0\."),
        ({"sparsity": 0.8, "rounds": -3}, r"rounds must be at least 1, got -3\."),
        ({"sparsity": 0.8, "rounds": 1, "schedule": "hybrid"}, r"hybrid needs at least 2 rounds, got 1"),
        ({"sparsity": 0.8, "rounds": 3, "schedule": "one_shot"}, r"rounds=3 does not go with schedule='one_shot'"),
        ({"sparsity": 0.8, "initial_sparsity": 0.8}, r"initial_sparsity must be in \[0, sparsity\), got 0\.8 with"),
        ({"sparsity": 0.8, "initial_sparsity": 0.9}, r"initial_sparsity must be in \[0, sparsity\), got 0\.9 with"),
        ({"sparsity": 0.8, "initial_sparsity": -0.1}, r"initial_sparsity must be in \[0, sparsity\), got -0\.1"),
        ({"sparsity": 0.8, "initial_sparsity": math.nan}, r"initial_sparsity must be in \[0, sparsity\), got nan"),
        ({"sparsity": 0.3, "initial_sparsity": 0.4}, r"initial_sparsity must be in \[0, sparsity\), got 0\.4"),
        (
            {"sparsity": 0.8, "initial_sparsity": 0.5, "schedule": "cubic"},
            r"initial_sparsity=0\.5 does not go with schedule='cubic'\. Leave it out, or take one of auto, hybrid\.",
        ),
        # An explicit list.
        ({"sparsities": []}, r"sparsities must name at least one round, got an empty list\."),
        ({"sparsities": [0.5, 0.4]}, r"sparsities must rise from round to round, got 0\.4 after 0\.5"),
        ({"sparsities": [0.5, 0.5]}, r"sparsities must rise from round to round, got 0\.5 after 0\.5"),
        ({"sparsities": [0.5], "rounds": 1}, r"sparsities says all about the rounds; leave out rounds\."),
        (
            {"sparsities": [0.5], "schedule": "cubic", "initial_sparsity": 0.1},
            r"sparsities says all about the rounds; leave out initial_sparsity, schedule\.",
        ),
        ({"sparsities": [0.5, 0.6], "sparsity": 0.5}, r"sparsities says all about the rounds; leave out sparsity\."),
        # Pacing.
        ({"sparsity": 0.8, "begin": 10, "end": 5}, r"begin must be before end, got begin=10 and end=5\."),
        ({"sparsity": 0.8, "begin": 10, "end": 10}, r"begin must be before end, got begin=10 and end=10\."),
        ({"sparsity": 0.8, "begin": 0.5, "end": 0.25}, r"begin must be before end, got begin=0\.5 and end=0\.25\."),
        ({"sparsity": 0.8, "begin": -1}, r"begin must be 0 or more \(steps, or below 1 a fraction .*\), got -1\."),
        ({"sparsity": 0.8, "begin": math.nan}, r"begin must be 0 or more .*, got nan\."),
        ({"sparsity": 0.8, "begin": math.inf}, r"begin must be 0 or more .*, got inf\."),
        ({"sparsity": 0.8, "end": 0}, r"end must be above 0 \(steps, or below 1 a fraction .*\), got 0\."),
        ({"sparsity": 0.8, "end": -5}, r"end must be above 0 .*, got -5\."),
        ({"sparsity": 0.8, "end": math.nan}, r"end must be above 0 .*, got nan\."),
        # Patience.
        ({"sparsity": 0.3, "patience": 0}, r"patience must be a whole number of at least 1, got 0\."),
        ({"sparsity": 0.3, "patience": True}, r"patience must be a whole number of at least 1, got True\."),
        ({"sparsity": 0.9, "patience": [2, 0.5]}, r"patience must be a whole number of at least 1, got 0\.5\."),
        ({"sparsity": 0.3, "patience": []}, r"patience must have one number, or at most one .* 1 rounds, got 0\."),
        (
            {"sparsity": 0.9, "rounds": 3, "patience": [1, 2, 3, 4]},
            r"patience must have one number, or at most one for each of the 3 rounds, got 4\.",
        ),
        (
            {"hold_zeros": True, "patience": 2},
            r"patience needs rounds to end, and with hold_zeros alone",
        ),
        ({"sparsity": 0.3, "patience": 2, "min_delta": -0.1}, r"min_delta must be 0 or more, .*, got -0\.1\."),
        ({"sparsity": 0.3, "patience": 2, "min_delta": math.nan}, r"min_delta must be 0 or more, .*, got nan\."),
        (
            {"sparsity": 0.3, "patience": 2, "max_round_steps": 0},
            r"max_round_steps must be a whole number of at least",
        ),
        ({"sparsity": 0.3, "patience": 2, "min_round_steps": -1}, r"min_round_steps must be a whole number of at lea"),
        (
            {"sparsity": 0.3, "patience": 2, "min_round_steps": 9, "max_round_steps": 5},
            r"min_round_steps must be at most max_round_steps, got 9 and 5\.",
        ),
        ({"sparsity": 0.3, "min_delta": 0.1}, r"min_delta needs patience: without it, rounds are spread evenly\."),
        ({"sparsity": 0.3, "max_round_steps": 9}, r"max_round_steps needs patience"),
        ({"sparsity": 0.3, "min_round_steps": 9}, r"min_round_steps needs patience"),
        ({"sparsity": 0.3, "restore": "last"}, r"restore needs patience"),
        # Granularity.
        ({"granularity": "4:2"}, r"granularity N:M keeps N of every M and needs 0 < N < M, got '4:2'\."),
        ({"granularity": "0:4"}, r"needs 0 < N < M, got '0:4'\."),
        ({"granularity": "4:4"}, r"needs 0 < N < M, got '4:4'\."),
        ({"granularity": "block:0x4", "sparsity": 0.5}, r"block:RxC needs R and C of at least 1, got 'block:0x4'\."),
        ({"granularity": "block:4x4"}, r"sparsity is missing"),
        (
            {"granularity": "2:4", "sparsity": 0.6},
            r"granularity '2:4' fixes sparsity at 0\.5, got 0\.6\. Leave sparsity out, or choose another ",
        ),
        ({"granularity": "2:4", "sparsity": 0.0}, r"granularity '2:4' fixes sparsity at 0\.5, got 0\.0"),
        (
            {"granularity": "2:4", "scope": "layer"},
            r"scope does not apply to granularity '2:4': weights compete within their groups, and each layer has the "
            r"same sparsity\. Leave scope out\.",
        ),
        ({"granularity": "2:4", "scope": "global"}, r"scope does not apply to granularity '2:4'"),
        ({"granularity": "2:4", "layer_sparsity": {"a": 0.5}}, r"layer_sparsity does not apply to granularity '2:4'"),
        (
            {"granularity": "2:4", "rounds": 3},
            r"the rounds of 2:4 go through \(M-1\):M, \(M-2\):M … 2:4: each prunes one more or several of every 4, "
            r"and the last ends at 0\.5; got sparsities 0\.166667, 0\.333333, 0\.5\. Take fewer rounds",
        ),
        (
            {"granularity": "1:4", "sparsities": [0.25, 0.5]},
            r"the rounds of 1:4 go through .* got sparsities 0\.25, 0\.5\.",
        ),
        (
            {"granularity": "1:4", "sparsities": [0.1, 0.75]},
            r"the rounds of 1:4 go through .* got sparsities 0\.1, 0\.75",
        ),
        (
            {"granularity": "2:4", "schedule": "cubic", "rounds": 3},
            r"the rounds of 2:4 go through .* Take fewer rounds, or another schedule\.",
        ),
        # Regular expressions.
        ({"sparsity": 0.8, "target_modules": "("}, r"target_modules: '\(' is not a regular expression \("),
        ({"sparsity": 0.8, "exclude_modules": "*"}, r"exclude_modules: '\*' is not a regular expression \("),
        ({"sparsity": 0.8, "target_modules": ["fc1", "("]}, r"target_modules: '\(' is not a regular expression \("),
        ({"sparsity": 0.8, "exclude_modules": ["[a"]}, r"exclude_modules: '\[a' is not a regular expression \("),
        ({"sparsity": 0.8, "layer_sparsity": {"(": 0.5}}, r"layer_sparsity: '\(' is not a regular expression \("),
        ({"sparsity": 0.8, "layer_sparsity": "{"}, r"layer_sparsity is not JSON \(.*\), got '\{'\."),
        ({"sparsity": 0.8, "layer_sparsity": ""}, r"layer_sparsity is not JSON \(.*\), got ''\."),
        ({"sparsity": 0.8, "score_steps": 0}, r"score_steps must be at least 1, got 0\."),
        ({"sparsity": 0.8, "calibration_samples": -1}, r"calibration_samples must be at least 1, got -1\."),
        ({"sparsity": 0.8, "layer_sparsity": "[1]"}, r"layer_sparsity must be an object such as .*, got '\[1\]'\."),
        ({"sparsity": 0.8, "layer_sparsity": "0.5"}, r"layer_sparsity must be an object such as .*, got '0\.5'\."),
        ({"sparsity": 0.8, "layer_sparsity": '{"a": "b"}'}, r"layer_sparsity\['a'\] must be a number .*, got 'b'\."),
    ],
    ids=str,
)
def test_a_config_that_makes_no_sense_is_an_error(values, message):
    with pytest.raises(ValueError, match=message):
        PruningConfig(**values)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("target_modules", [5]), ("target_modules", [None]), ("exclude_modules", [5]), ("patience", ["3"])],
        *[("patience", True), ("layer_sparsity", {3: 0.5}), ("begin", 1.5), ("end", 10.5)],
    ],
    ids=str,
)
def test_a_value_of_a_wrong_kind_inside_of_a_field_names_the_field(name, value):
    with pytest.raises(ValueError, match=rf"^{name}\b.* got "):
        PruningConfig(**{"sparsity": 0.5, name: value})


def test_an_unknown_key_in_a_saved_config_is_an_error(tmp_path):
    PruningConfig(sparsity=0.5).save_pretrained(tmp_path)
    path = tmp_path / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "patient": 3, "amount": 0.5}))
    message = (
        r"unknown key 'amount', 'patient' in a pruning config\. Known are sparsity, keep_parameters, .*, uniform\. "
        r"Was it saved by a newer version of hf_prune\?"
    )
    with pytest.raises(ValueError, match=message):
        PruningConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"pruning_config\.json is not JSON \("),
        (b"{", r"pruning_config\.json is not JSON \("),
        (b'{"sparsity": 0.5', r"pruning_config\.json is not JSON \("),
        (b"\xff\xfe\xfa", r"pruning_config\.json is not JSON \("),
        (b"[]", r"pruning_config\.json "),
        (b"null", r"pruning_config\.json "),
        (b"3", r"pruning_config\.json "),
        (b'"text"', r"pruning_config\.json "),
        (b'{"sparsity": 80}', r"sparsity must be in \[0, 1\), got 80\. Did you mean 0\.8\?"),
        (b'{"sparsity": NaN}', r"sparsity must be in \[0, 1\), got nan"),
        (b"{}", r"sparsity is missing"),
    ],
)
def test_a_damaged_config_is_an_error(tmp_path, content, message):
    (tmp_path / CONFIG_NAME).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        PruningConfig.from_pretrained(tmp_path)


def test_a_missing_config_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"no pruning_config\.json in {re.escape(str(tmp_path))}"):
        PruningConfig.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no pruning_config\.json in "):
        PruningConfig.from_pretrained(Path(tmp_path) / "missing")


WRONG_TYPES = [
    (name, value, words)
    for name, words, values in [
        ("sparsity", "float or None", ["0.8", True, [0.8]]),
        ("schedule", "str", [None, ["cubic"]]),
        ("rounds", "int or None", [2.0, 2.5, math.nan, "3", True, [3]]),
        ("initial_sparsity", "float or None", ["0.5", True, [0.5]]),
        ("sparsities", "list or None", [0.5, "0.5", {"a": 0.5}, True]),
        ("criterion", "str", [3, ["magnitude"]]),
        ("granularity", "str", [3, ["2:4"]]),
        ("scope", "str", [None, ["layer"]]),
        ("layer_sparsity", "dict or str or None", [[0.5], 0.5, [("a", 0.5)]]),
        ("target_modules", "list or None or str", [3, {"a": 1}]),
        ("exclude_modules", "list or None or str", [3, True]),
        ("begin", "float", [None, "5", True, [5]]),
        ("end", "float or None", ["10", True, [5]]),
        ("patience", "list or None", ["3", 2.5, {"a": 1}]),
        ("max_round_steps", "int or None", [2.5, "3", True]),
        ("metric", "str or None", [3, ["loss"]]),
        ("restart_lr", "bool", [1, None, "yes"]),
        ("hold_zeros", "bool", [1, None, "no"]),
    ]
    for value in values
]


@pytest.mark.parametrize(("name", "value", "words"), WRONG_TYPES)
def test_a_value_of_a_wrong_type_is_an_error(name, value, words):
    with pytest.raises(ValueError, match=rf"^{name} must be {words}, got {re.escape(repr(value))}\."):
        PruningConfig(**{"sparsity": 0.8, name: value})


@pytest.mark.parametrize(
    ("config", "rounds"),
    [
        ({"granularity": "2:4", "schedule": "constant"}, [1 / 4, 2 / 4]),
        ({"granularity": "2:4", "schedule": "cubic"}, [1 / 4, 2 / 4]),
        ({"granularity": "2:4", "schedule": "hybrid"}, [1 / 4, 2 / 4]),
        ({"granularity": "1:4", "schedule": "geometric"}, [1 / 4, 2 / 4, 3 / 4]),
    ],
)
def test_every_schedule_works_with_a_pattern_alone(config, rounds):
    assert PruningConfig(**config).round_sparsities == rounds
