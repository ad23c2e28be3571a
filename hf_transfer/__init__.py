"""Transfer learning for transformers: what to train, what to learn from, what to align, what to keep.

The public names stand in ``__init__.pyi``; each is imported when it is first used, so that importing the package costs
next to nothing.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
