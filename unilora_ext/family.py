"""The family theta_D = c + P theta_d, by name. Imports nothing."""

__all__ = ["FAMILY"]

FAMILY = {
    "identity": "IdentityProjection",
    "uniform": "UniformProjection",
    "balanced": "BalancedProjection",
    "peft": "PeftProjection",
    "local": "LocalProjection",
    "nonuniform": "NonuniformProjection",
    "countsketch": "CountSketchProjection",
    "vera": "VeraProjection",
    "tied": "TiedProjection",
    "vblora": "VBLoraProjection",
    "loraxs": "LoraXSProjection",
    "gaussian": "GaussianProjection",
    "fastfood": "FastfoodProjection",
    "fourierft": "FourierFTProjection",
    "tinylora": "TinyLoraProjection",
}
"""The class of each name, in the module of that name in :mod:`unilora_ext.projections`."""
