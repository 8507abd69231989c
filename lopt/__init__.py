"""A learned optimizer for PyTorch: `lopt.HRNN` takes the place of a `torch.optim` optimizer."""

from lopt.config import HRNNConfig
from lopt.hrnn import HRNN
from lopt.metaparams import MetaParams

__all__ = ["HRNN", "HRNNConfig", "MetaParams", "__version__"]

__version__ = "0.1.0"
