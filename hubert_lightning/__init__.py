"""HuBERT (Hsu et al. 2021, arXiv 2106.07447) as a PyTorch Lightning application.

`__init__.pyi` lists the public names. Each is imported at its first use, since importing torch and Lightning takes
seconds.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
