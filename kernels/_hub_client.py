"""Share the import name `kernels` with Hugging Face's hub client when that is installed too.

transformers looks for a distribution called `kernels` and, finding one, does `from kernels import LayerRepository, ...` at import
time. Inside this checkout that name is ours, so this package serves the client too: the client's folder joins our `__path__`, which
makes its submodules importable (ours are found first), and its public names resolve on demand.

Where the client is not installed, none of its names resolve. This package has no `__version__`, which transformers would take for the
client's. bitsandbytes then finds no `get_kernel` here and falls back to its own code; its warning, which advises to `pip install kernels`
(this checkout would hide that), is filtered out.
"""

import logging
import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_ALIAS = "kernels._hub_client_init"  # the client's __init__.py, executed under a name that is free
_BITSANDBYTES = logging.getLogger("bitsandbytes.backends.cpu.ops")


def lend(package: str, path: list[str]):
    """Return a module `__getattr__` for `package` that serves the hub client's names.

    Appends the client's folder to `path`, the package's `__path__`.
    """
    init = _client_init(path)
    if init is None:
        _BITSANDBYTES.addFilter(_is_not_about_the_client)
    else:
        path.append(str(init.parent))

    def __getattr__(name: str):
        private = name.startswith("__") and name != "__version__"
        if init is None or private:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(_load(init), name)

    return __getattr__


def _client_init(path: list[str]) -> Path | None:
    """Return the client's `__init__.py`; None if it is not installed, or ours was installed over it."""
    try:
        init = Path(distribution("kernels").locate_file("kernels/__init__.py")).resolve()
    except PackageNotFoundError:
        return None
    ours = {Path(folder).resolve() for folder in path}
    return init if init.is_file() and init.parent not in ours else None


def _is_not_about_the_client(record: logging.LogRecord) -> bool:
    """Filter out bitsandbytes' warning that `get_kernel` cannot be imported; every other record passes."""
    error = record.args[0] if isinstance(record.args, tuple) and record.args else None
    return not (isinstance(error, ImportError) and "get_kernel" in str(error))


def _load(init: Path):
    """Execute the client's `__init__.py` once and return its module.

    Its relative imports resolve to `kernels.*`, so its modules exist once too.
    """
    if _ALIAS not in sys.modules:
        spec = spec_from_file_location(_ALIAS, init)
        spec.submodule_search_locations = None  # a plain module of the package `kernels`, not a package of its own
        sys.modules[_ALIAS] = module = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[_ALIAS]
            raise
    return sys.modules[_ALIAS]
