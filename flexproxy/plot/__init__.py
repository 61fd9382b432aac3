"""Pictures of what a mask keeps: of a Selection, of any BlockMask, of the layers of a model.

Each function returns a matplotlib Figure, on white whatever surrounds it; ``save`` writes it. Needs matplotlib, which
is imported when it is first used. Like ``flexproxy.stats``, these functions wait for the device.
"""

from flexproxy.plot.blocks import block_map, ranking
from flexproxy.plot.calibrations import calibration
from flexproxy.plot.figures import save
from flexproxy.plot.layers import density, record

__all__ = ["block_map", "calibration", "density", "ranking", "record", "save"]
