"""What holds for the package as a whole: imports point one way, nothing optional is needed, nothing prints."""

import ast
import doctest
import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_prune
from hf_prune.structures import families

PACKAGE = Path(hf_prune.__file__).parent
# A wing with its files, or a file at the door. Each imports only files before it.
LAYOUT = """
distributed     shards zero gathering processes digests tensor_files
schedules
criteria
scopes
weights         timm body targets masks gradient_hooks zero_checks snapshot movement compression
calibration     contexts batches samples activations passes per_sample_gradients statistics saved_statistics costs
structures      example_inputs norms groups criteria routed gatherers contributions gates statistics ranking names
                families entries decompression loading registration layer stacks routing experts expert_neurons widths
                channels comparing configs removal small_models trial tracing discovery proof heads_and_neurons by_kind
                shrinking finding budgets
selection       layer_sparsity lowest scoring cuts granularity weight_groups patterns whole_structures
granularities
recovery        masked_lora lora distillation
pacing          timing even patience
config
plan
reconstruction  dependencies order sums stages moments sparsegpt compensation
reporting       tables plots history reports savings
inference       semi_structured
pruning
analysis        report sensitivity
training        endings events monitor optimizers overrun renamed_weights checkpoints rounds run
metrics
callback
publishing      folders opening readers cards hub inspection comparison pages
cli
distillation
"""
ROWS = [line.split() for line in re.sub(r"\n +", " ", LAYOUT).strip().splitlines()]
WINGS = [wing for wing, *files in ROWS if files]
ORDER = [".".join(filter(None, (wing, file))) for wing, *files in ROWS for file in files or [""]]
PACKAGES = ["__init__", *(f"{wing}.__init__" for wing in WINGS)]
SUBPACKAGES = ("hf_prune", *(f"hf_prune.{wing}" for wing in WINGS))
OPTIONAL = ("evaluate", "peft", "matplotlib", "torch_pruning", "datasets")
# Where an `assert` tells the type checker what the code above it has made sure of. None may guard what a user gives.
NARROWING = {
    ("config", "own_sparsities"),
}
# Where any error is caught: a model may raise anything when it is called or built, no error may lose a training that
# is over, and none may leave other processes waiting.
GUARDS = {
    ("calibration.costs", "measure_cost_or_parameters"),
    ("distributed.processes", "_can_be_sent"),
    ("distributed.processes", "failing_together"),
    ("publishing.hub", "_costs"),
    ("structures.comparing", "__init__"),
    ("structures.comparing", "_difference"),
    ("structures.comparing", "is_what_its_config_builds"),
    ("structures.comparing", "require_same"),
    ("structures.comparing", "why_not_generated"),
    ("structures.norms", "norm_of"),
    ("structures.small_models", "small_model_like"),
    ("training.endings", "logged_on_error"),
}

MAP = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_contributing_shows_every_wing_and_every_file_at_the_door():
    drawn = re.findall(r"^  (\w+)(?:/|\.py) ", MAP, flags=re.MULTILINE)
    assert sorted(drawn) == sorted({*(row[0] for row in ROWS), "__init__"})


MODULES = pytest.mark.parametrize("module", ORDER)


@functools.cache
def tree(module):
    return ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))


def imported_files(source, package="hf_prune"):
    """Names of the files of the package that a piece of its source imports, inside of functions too."""
    names = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(filter(None, [*parents[: len(parents) + 1 - node.level], node.module]))
            base = base if node.level else str(node.module)
            # `from . import masks` imports a file; `from .weights.masks import MaskSet` a name in one.
            paths = [f"{base}.{alias.name}" for alias in node.names] if base in SUBPACKAGES else [base]
        else:
            continue
        names |= {path.partition(".")[2] or "__init__" for path in paths if in_package(path)}
    return names


def package_of(module):
    return f"hf_prune.{module}".rpartition(".")[0]


def in_package(path):
    return path.split(".")[0] == "hf_prune"


def imported_packages(nodes):
    """Names of the other packages that statements import."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names


def functions(source):
    return [node for node in ast.walk(source) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


# Imports


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from . import metrics, schedules", {"metrics", "schedules"}),
        ("from .weights.masks import MaskSet", {"weights.masks"}),
        ("import hf_prune.weights.masks", {"weights.masks"}),
        ("import hf_prune", {"__init__"}),
        ("from hf_prune.weights import masks", {"weights.masks"}),
        ("from hf_prune.weights.masks import MaskSet", {"weights.masks"}),
        ("def f():\n    if True:\n        from .weights.masks import MaskSet", {"weights.masks"}),
        ("from .structures.groups import Member", {"structures.groups"}),
        ("import torch\nfrom transformers.utils import logging", set()),
    ],
)
def test_an_import_is_recognised(source, expected):
    assert imported_files(ast.parse(source)) == expected


def test_every_file_has_its_place_in_the_order():
    files = (path.relative_to(PACKAGE).with_suffix("").parts for path in PACKAGE.rglob("*.py"))
    found, listed = {".".join(parts) for parts in files}, {*PACKAGES, *ORDER}
    assert found == listed, f"put into LAYOUT {found - listed}, and take out {listed - found}"


@MODULES
def test_a_file_imports_only_files_above_it(module):
    assert imported_files(tree(module), package_of(module)) <= set(ORDER[: ORDER.index(module)])


@MODULES
def test_no_file_asks_the_package_itself(module):
    """Its names come by a lock when they are asked for, behind which no import may wait for another."""
    sources = [node for node in ast.walk(tree(module)) if isinstance(node, ast.ImportFrom) and node.level]
    parents = module.count(".") + 1
    assert not [node for node in sources if node.module is None and node.level == parents]


# The house


def test_the_door_has_room_for_twelve():
    assert len(list(PACKAGE.glob("*.py"))) <= 12


@MODULES
def test_a_file_is_short_enough_to_be_read(module):
    assert len((PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8").splitlines()) <= 350


@MODULES
def test_a_function_has_few_parameters(module):
    """Except where users give each by its name: what always travels together is a record."""
    public = {("publishing.hub", "save_pretrained"), ("publishing.hub", "push_to_hub")}
    public |= {("analysis.sensitivity", "sensitivity"), ("cli", "prune_command"), ("cli", "sensitivity_command")}
    for function in functions(tree(module)):
        given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        taken = [each.arg for each in given if each.arg not in ("self", "cls")]
        assert (module, function.name) in public or len(taken) <= 7


def test_a_config_is_words_at_the_door_and_a_plan_behind_it():
    """Whoever names the class, or takes a config, is where a user hands one over, or makes the plan."""
    named = set()
    for module in ["__init__", *ORDER]:
        for node in ast.walk(tree(module)):
            takes = isinstance(node, ast.arg) and node.arg == "config"
            if takes or "PruningConfig" in (getattr(node, "id", ""), getattr(node, "name", "")):
                named.add(module)
    named -= {"recovery.masked_lora"}  # That is peft's.
    assert named == {
        *("__init__", "config", "plan", "pruning", "callback", "cli"),
        *("analysis.sensitivity", "reporting.reports", "publishing.hub"),
    }  # fmt: skip


@MODULES
def test_a_granularity_is_read_where_a_config_is_and_asked_instead_of_told_apart(module):
    calls = [node for node in ast.walk(tree(module)) if isinstance(node, ast.Call)]
    names = {ast.unparse(call.func) for call in calls}
    assert "parse_granularity" not in names or module in ("config", "plan")
    told_apart = {ast.unparse(call.args[1]) for call in calls if ast.unparse(call.func) == "isinstance"}
    assert not told_apart & {"Unstructured", "Block", "Pattern", "Structural", "Granularity"}


@MODULES
def test_a_file_imports_what_is_optional_only_where_it_is_needed(module):
    source = tree(module)
    inside = [node for function in functions(source) for node in ast.walk(function)]
    for_the_type_checker = [
        node
        for block in ast.walk(source)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    ]
    at_the_top = imported_packages(set(ast.walk(source)) - set(inside) - set(for_the_type_checker))
    # Rooms of their own, which `import hf_prune` does not enter.
    rooms = {"metrics": {"evaluate", "datasets"}, "recovery.masked_lora": {"peft"}}
    assert at_the_top & set(OPTIONAL) == rooms.get(module, set())
    needed = {
        "recovery.lora": {"peft"}, "reporting.plots": {"matplotlib"}, "structures.channels": {"torch_pruning"},
    }  # fmt: skip
    assert imported_packages(inside) & set(OPTIONAL) == needed.get(module, set())


def run(code):
    """Runs code in a fresh process; gives what it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_the_package_brings_in_nothing_optional():
    """Transformers itself brings in peft, where it is installed, with `TrainerCallback`; that is not ours."""
    code = f"""
import sys
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
before = set(sys.modules)
import hf_prune
everything = [getattr(hf_prune, name) for name in hf_prune.__all__]
print([name for name in {OPTIONAL} if name in set(sys.modules) - before])
print("hf_prune.callback" in sys.modules)
"""
    assert run(code) == ["[]", "True"]


def test_the_package_works_where_nothing_optional_is_installed():
    code = f"""
import sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {OPTIONAL} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
import torch
import hf_prune
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
print(hf_prune.prune(model, hf_prune.PruningConfig(sparsity=0.75)).sparsity)
print(hf_prune.PruningTrainerCallback(hf_prune.PruningConfig(sparsity=0.75)).config.sparsity)
print([name for name in {OPTIONAL} if name in sys.modules])
"""
    assert run(code) == ["0.75", "0.75", "[]"]


# What the package is made of


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()


def test_each_public_name_is_imported_from_where_type_checkers_are_told():
    (block,) = (node for node in tree("__init__").body if ast.unparse(node).startswith("if TYPE_CHECKING:"))
    told = {alias.name: node.module for node in block.body for alias in node.names}
    assert told == hf_prune._MODULES
    assert sorted(hf_prune.__all__) == sorted(told)
    assert len(set(hf_prune.__all__)) == len(hf_prune.__all__)
    assert set(hf_prune.__all__) <= set(dir(hf_prune))


@pytest.mark.parametrize("name", hf_prune.__all__)
def test_public_names_are_what_their_modules_hold(name):
    assert getattr(hf_prune, name) is vars(importlib.import_module(f"hf_prune.{hf_prune._MODULES[name]}"))[name]


def test_modules_are_attributes_of_the_package():
    code = """
import hf_prune
print(hf_prune.schedules.__name__, hf_prune.weights.__name__, hf_prune.checkpoints.__name__)
print(hasattr(hf_prune, "nonsense"), hasattr(hf_prune, "__wrapped__"))
"""
    names = ["hf_prune.schedules", "hf_prune.weights", "hf_prune.training.checkpoints"]
    assert run(code) == [*names, "False", "False"]
    with pytest.raises(AttributeError, match="module 'hf_prune' has no attribute 'nonsense'"):
        _ = hf_prune.nonsense


def test_a_module_that_lacks_a_package_says_which(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    monkeypatch.delitem(sys.modules, "hf_prune.metrics", raising=False)
    monkeypatch.delitem(vars(hf_prune), "metrics", raising=False)
    with pytest.raises(ModuleNotFoundError, match="evaluate"):
        _ = hf_prune.metrics


def test_the_public_names_are_these():
    assert set(hf_prune.__all__) == {
        "CalibrationStatistics",
        "Heads",
        "MaskSet",
        "Neurons",
        "PruningConfig",
        "PruningHistory",
        "PruningTrainerCallback",
        "ScoreInputs",
        "SensitivityReport",
        "SparsityReport",
        "Stack",
        "collect_statistics",
        "describe_family",
        "keep_sparsity",
        "prune",
        "push_to_hub",
        "save_pretrained",
        "sensitivity",
        "shrink",
        "sparsity_report",
        "to_sparse_semi_structured",
    }


@pytest.mark.parametrize("module", [*PACKAGES, *ORDER])
def test_every_file_says_what_it_is(module):
    assert ast.get_docstring(tree(module))


@pytest.mark.parametrize("module", [*PACKAGES, *ORDER])
def test_nothing_prints_or_warns_except_through_the_log(module):
    source = tree(module)
    calls = [node.func for node in ast.walk(source) if isinstance(node, ast.Call)]
    names = {function.id for function in calls if isinstance(function, ast.Name)}
    assert not names & {"print", "input", "exit", "quit", "breakpoint"}
    assert "warnings" not in imported_packages(ast.walk(source))
    assert not {"stdout", "stderr"} & {node.attr for node in ast.walk(source) if isinstance(node, ast.Attribute)}
    # `logging` is used for `logger = logging.getLogger(__name__)` and its levels, and under no other name.
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            assert all(alias.name != "logging" or alias.asname is None for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.module != "logging"
            assert all(alias.name not in ("logging", "get_logger") for alias in node.names)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "logging":
            assert node.attr in ("getLogger", "DEBUG", "INFO", "WARNING", "ERROR")
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "logging.getLogger":
            assert ast.unparse(node) == "logging.getLogger(__name__)"


def functions_with(matches):
    """File and name of each function that holds a statement of some kind."""
    return {
        (module, function.name)
        for module in ORDER
        for function in functions(tree(module))
        for node in ast.walk(function)
        if matches(node)
    }


def catches_all(node):
    return isinstance(node, ast.ExceptHandler) and (
        node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
    )


def test_no_assert_guards_what_a_user_gives():
    found = functions_with(lambda node: isinstance(node, ast.Assert))
    assert found == NARROWING
    total = sum(isinstance(node, ast.Assert) for module in ORDER for node in ast.walk(tree(module)))
    assert total == len(found)


def test_no_error_is_swallowed_unseen():
    assert functions_with(catches_all) == GUARDS
    outside = sum(catches_all(node) for module in ORDER for node in ast.walk(tree(module)))
    assert outside == len(GUARDS)  # None outside of functions, and none behind another.
    calls = {ast.unparse(node) for module in ORDER for node in ast.walk(tree(module)) if isinstance(node, ast.Call)}
    assert not {call for call in calls if re.fullmatch(r"contextlib\.suppress\((Base)?Exception\)", call)}


@MODULES
def test_the_examples_in_the_docstrings_are_right(module, monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))  # One of them adds to it.
    outcome = doctest.testmod(importlib.import_module(f"hf_prune.{module}"))
    assert outcome.failed == 0


def test_there_are_examples():
    """A finder that finds nothing would pass."""
    with_examples = [module for module in ORDER if ">>>" in ast.unparse(tree(module))]
    assert {
        "schedules",
        "criteria",
        "selection.lowest",
        "granularities",
        "weights.masks",
        "pacing.even",
        "config",
    } <= set(with_examples)
    finder = doctest.DocTestFinder()
    for module in with_examples:
        found = finder.find(importlib.import_module(f"hf_prune.{module}"))
        assert sum(len(test.examples) for test in found) > 0
