"""`from_pretrained` reads what hf_prune has written, whichever of Transformers and hf_prune is imported first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hf_prune
from hf_prune import PruningConfig, prune, save_pretrained, shrink
from tests.tiny import build

ROOT = Path(hf_prune.__file__).parents[1]


def run(code: str, *words: object) -> list[str]:
    """Runs code in a fresh process; gives the lines that it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


# With Transformers itself

ANEW = """
for name in [name for name in sys.modules if name.partition(".")[0] == "hf_prune"]:
    del sys.modules[name]
import hf_prune
"""
ORDERS = {
    "hf_prune": "import hf_prune",
    "models": "from transformers import GPTNeoForCausalLM\nimport hf_prune",
    "Transformers, which is lazy": "from transformers import AutoModelForCausalLM\nimport hf_prune",
    "the file that registers": "import hf_prune.structures.loading",
    # Joined: two threads that import Transformers at once may fail without hf_prune too.
    "a thread": "import hf_prune, threading\n"
    "thread = threading.Thread(target=__import__, args=['transformers.modeling_utils'])\n"
    "thread.start()\nthread.join()",
    "anew after": f"import hf_prune.pruning{ANEW}",
}
IMPORTED = [
    "hf_prune",
    "hf_prune.structures",
    "hf_prune.structures.decompression",
    "hf_prune.structures.entries",
    "hf_prune.structures.families",
    "hf_prune.structures.loading",
    "hf_prune.structures.names",
    "hf_prune.structures.registration",
    "hf_prune.weights",
    "hf_prune.weights.compression",
]
LOAD = """
import sys
{first}
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    print(model.num_parameters(), sum(int((tensor == 0).sum()) for tensor in model.parameters()))
print(*sorted(name for name in sys.modules if name.partition(".")[0] == "hf_prune"))
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folders that plain Transformers cannot read, and what is in them."""
    shrunk, compressed = build("gpt_neo"), build("llama")
    prune(shrunk, PruningConfig(sparsity=0.5, granularity="head"))
    shrink(shrunk)
    prune(compressed, PruningConfig(sparsity=0.8))
    folders = [tmp_path_factory.mktemp(name) for name in ("shrunk", "compressed")]
    for folder, model in zip(folders, (shrunk, compressed), strict=True):
        save_pretrained(model, folder, compress=model is compressed)
    counts = [
        f"{model.num_parameters()} {sum(int((tensor == 0).sum()) for tensor in model.parameters())}"
        for model in (shrunk, compressed)
    ]
    return folders, counts


@pytest.mark.parametrize(
    "first",
    [name if name == "hf_prune" else pytest.param(name, marks=pytest.mark.slow) for name in ORDERS],
)
def test_models_are_read_whatever_is_imported_first(first, written):
    folders, counts = written
    *printed, modules = run(LOAD.format(first=ORDERS[first]), *folders)
    assert printed == counts
    if first == "hf_prune":  # Another file may be what has imported Transformers, and cannot be waited for.
        assert modules.split() == IMPORTED


# With files that stand for Transformers and for `loading.py`, which take no time

STAND_INS = """
import importlib, pathlib, sys, threading, time
sys.path.insert(0, sys.argv[1])
import hf_prune, hf_prune.structures
hf_prune.structures.__path__.insert(0, sys.argv[1])
"""


def run_with_stand_ins(code: str, folder: Path, models: str = "", loading: str = "print('loaded')") -> list[str]:
    (folder / "transformers").mkdir()
    (folder / "transformers" / "__init__.py").touch()
    (folder / "transformers" / "modeling_utils.py").write_text(f"print('models')\n{models}")
    (folder / "loading.py").write_text(loading)
    return run(STAND_INS + code, folder)


def test_importing_the_package_imports_no_more_than_python_has():
    code = "import sys, hf_prune\nprint({'torch', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules))"
    assert run(code) == ["set()"]


def test_registration_follows_the_import_of_models_and_leaves_no_trace_on_it(tmp_path):
    code = """
import transformers
print("lazy")
import transformers.modeling_utils as models
print(type(models.__loader__).__name__, models.__spec__.loader is models.__loader__)
"""
    assert run_with_stand_ins(code, tmp_path) == ["lazy", "models", "loaded", "SourceFileLoader True"]


def test_it_is_at_once_where_models_are_imported_already(tmp_path):
    code = """
del sys.modules["hf_prune"], sys.modules["hf_prune.structures.registration"]
sys.meta_path.pop(0)
import transformers.modeling_utils
print("then")
import hf_prune
"""
    assert run_with_stand_ins(code, tmp_path) == ["models", "then", "loaded"]


def test_an_error_of_transformers_stays_what_it_is_and_may_be_mended(tmp_path):
    code = """
try:
    import transformers.modeling_utils
except ImportError as error:
    print(repr(error), error.__cause__, error.__context__)
pathlib.Path(sys.argv[1], "transformers", "modeling_utils.py").write_text("print('mended models')")
import transformers.modeling_utils
"""
    printed = run_with_stand_ins(code, tmp_path, models="raise ImportError('too old')")
    assert printed == ["models", "ImportError('too old') None None", "mended models", "loaded"]


def test_an_error_of_registration_is_not_lost(tmp_path):
    code = """
try:
    import transformers.modeling_utils
except ImportError as error:
    print(error)
"""
    assert run_with_stand_ins(code, tmp_path, loading="raise ImportError('too new')") == ["models", "too new"]


def test_a_package_that_is_reloaded_waits_once(tmp_path):
    code = """
waiting = len(sys.meta_path)
importlib.reload(hf_prune)
print(len(sys.meta_path) - waiting)
import transformers.modeling_utils
"""
    assert run_with_stand_ins(code, tmp_path) == ["0", "models", "loaded"]


def test_threads_that_import_both_do_not_wait_for_each_other(tmp_path):
    code = """
def run(name, wait):
    time.sleep(wait)
    __import__(name)
waits = {waits}
threads = [threading.Thread(target=run, args=item, daemon=True) for item in waits.items()]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(20)
print(*(thread.is_alive() for thread in threads))
"""
    loading = "print('loading')\nimport time\ntime.sleep(0.3)\nimport transformers.modeling_utils\nprint('loaded')"
    for first, second in ((0.0, 0.1), (0.1, 0.0)):
        folder = tmp_path / str(first)
        folder.mkdir()
        waits = {"transformers.modeling_utils": first, "hf_prune.structures.loading": second}
        printed = run_with_stand_ins(code.format(waits=waits), folder, "import time\ntime.sleep(0.3)", loading)
        assert sorted(printed) == ["False False", "loaded", "loading", "models"]


@pytest.mark.slow
def test_threads_ask_for_public_names_at_the_same_time():
    code = """
import hf_prune, threading
barrier, failed = threading.Barrier(len(hf_prune.__all__)), []
def ask(name):
    barrier.wait()
    try:
        getattr(hf_prune, name)
    except BaseException as error:
        failed.append((name, repr(error)))
threads = [threading.Thread(target=ask, args=[name]) for name in hf_prune.__all__]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(failed)
"""
    assert run(code) == ["[]"]


def test_dir_shows_the_public_names():
    assert [name for name in dir(hf_prune) if not name.startswith("__")] == sorted(hf_prune.__all__)
