"""Whether a file fits a device: memory, the longest context and the expected speed, from a header or a plan alone.

`weights_of` reads what memory depends on, `fit` adds it up, `devices` are the devices that are known.
"""

from pocketquant.fit.devices import Device, Figure, device_named, devices
from pocketquant.fit.fitting import Beside, Fit, Speed, fit
from pocketquant.fit.memory import Part, Settings, memory_parts
from pocketquant.fit.vision import Tower, tower_of
from pocketquant.fit.weights import Held, Weights, held, weights_of

__all__ = [
    "Beside",
    "Device",
    "Figure",
    "Fit",
    "Held",
    "Part",
    "Settings",
    "Speed",
    "Tower",
    "Weights",
    "device_named",
    "devices",
    "fit",
    "held",
    "memory_parts",
    "tower_of",
    "weights_of",
]
