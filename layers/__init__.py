"""Decoder layers: one file per mixer, and the small parts they share.

`build("window", width=512, heads=8, window=257)` makes a mixer by name; importing this package registers them all.
"""

from farspan.layers import cca, local_linear, rat, rcmha, routing, softmax, softplus, titans, window
from farspan.layers.mixer import MIXERS, Mixed, Mixer, build
from farspan.layers.sequence import Sequence

__all__ = [
    "MIXERS",
    "Mixed",
    "Mixer",
    "Sequence",
    "build",
    "cca",
    "local_linear",
    "rat",
    "rcmha",
    "routing",
    "softmax",
    "softplus",
    "titans",
    "window",
]
