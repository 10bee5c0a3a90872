"""Share the import name `kernels` with Hugging Face's hub client when that is installed too.

transformers looks for a distribution called `kernels` and, finding one, does `from kernels import LayerRepository, ...` at import
time. Inside this checkout that name is ours, so we lend it the client: the client's folder joins our `__path__`, which makes its
submodules importable (ours are found first), and its public names resolve on demand.

Only where the client is installed does anything of it show. In particular we have no `__version__` of our own: transformers
would take it for the client's. Where it is not, bitsandbytes finds no `get_kernel` here, falls back to its own code, and would advise to
`pip install kernels`, which this checkout would hide: that one warning is filtered out.
"""

import logging
import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_ALIAS = "kernels._hub_client_init"  # the client's __init__.py, executed under a name that is free
_BITSANDBYTES = logging.getLogger("bitsandbytes.backends.cpu.ops")


def lend(package: str, path: list[str]):
    """Append the client's folder to `path`, the `__path__` of `package`; return a module `__getattr__` that serves its names."""
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
    """The client's `__init__.py`, or None where it is not installed (or where ours was installed over it)."""
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
    """Execute the client's `__init__.py` once. Its relative imports resolve to `kernels.*`, so its modules exist once too."""
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
