"""crate-ray: pretraining of CRATE-MAE and MAE on Ray.

Importing this package does nothing: no rooms are loaded, no device is touched.
"""

__version__ = "0.1.0"
