"""Registration with Transformers, which waits until Transformers can load models.

`import hf_prune` promises that `from_pretrained` reads what hf_prune has written. `loading.py` sees to that, and needs
Transformers, which takes seconds to import. So it is imported right after `transformers.modeling_utils`, before which
there is no `from_pretrained`, by whoever imports that one.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_MODELS = "transformers.modeling_utils"


def register_with_transformers() -> None:
    """Imports `loading.py` as soon as models can be loaded: at once, or when they can."""
    if _MODELS in sys.modules:
        import hf_prune.structures.loading  # noqa: F401
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds `transformers.modeling_utils` as finders after it do, and has it followed by `loading.py`.

    It stays: an import that fails may be tried again, and a finder that goes could make another thread, on its way
    through `sys.meta_path`, miss the next one.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MODELS or self not in sys.meta_path:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec, spec.loader)
                return spec
        return None


class _Loader(Loader):
    """Runs a module as its own loader does, and then `loading.py`."""

    def __init__(self, spec: ModuleSpec, loader: Loader) -> None:
        self._spec, self._loader = spec, loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._spec.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        # By a statement, which goes on where another thread is amid this import, and waits for this one;
        # `import_module` would raise an error then.
        import hf_prune.structures.loading  # noqa: F401
