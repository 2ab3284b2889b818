"""jaxskip: JAX models that do less work.

Update rules (``jaxskip.optim``), objectives (``jaxskip.losses``), models and pretrained weights (``jaxskip.models``),
inference that skips (``jaxskip.skipping``) and its building blocks (``jaxskip.nn``), gradient coding
(``jaxskip.coding``), pipelines that skip stages (``jaxskip.pipeline``), the training loop (``jaxskip.training``),
measurements (``jaxskip.analysis``) and data
(``jaxskip.data``) load when they are first used: ``import jaxskip`` alone imports nothing heavy and starts no device.
"""

import importlib
import pkgutil

__version__ = "0.1.0"

_SUBPACKAGES = frozenset(module.name for module in pkgutil.iter_modules(__path__) if module.ispkg)


def __getattr__(name: str):
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its subpackages are {sorted(_SUBPACKAGES)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBPACKAGES})
