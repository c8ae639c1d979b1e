"""What a U-Net variant costs. The parts lie at the top of the repository; the links beside this file lead there.

A package of its own, so that a folder of this name beside somebody's work does not take its place.
"""

from __future__ import annotations

__version__ = "0.1.0"
