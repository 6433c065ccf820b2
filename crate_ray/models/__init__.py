"""The models: CRATE-MAE, MAE, the CRATE classifier; their weights and their costs.

Names are loaded when first used: `crate_ray.models.cost` is arithmetic and must not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crate_ray.models.classifier import Classifier as Classifier
    from crate_ray.models.create import create_model as create_model
    from crate_ray.models.create import with_shared_weights as with_shared_weights
    from crate_ray.models.masked_autoencoder import MaskedAutoencoder as MaskedAutoencoder
    from crate_ray.models.masked_autoencoder import MaskedAutoencoderOutput as MaskedAutoencoderOutput
    from crate_ray.models.weights import load_weights as load_weights

_HOMES = {
    "Classifier": "classifier",
    "MaskedAutoencoder": "masked_autoencoder",
    "MaskedAutoencoderOutput": "masked_autoencoder",
    "create_model": "create",
    "load_weights": "weights",
    "with_shared_weights": "create",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'crate_ray.models' has no attribute '{name}'")
    return getattr(import_module(f"crate_ray.models.{_HOMES[name]}"), name)
