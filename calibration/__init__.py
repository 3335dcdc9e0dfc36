"""An exported model becomes a quantised one, with what that costs measured: batches -> ranges -> scales -> graph -> limits."""

from export_vq.calibration.options import CalibrationOptions
from export_vq.calibration.run import calibrate

__all__ = ["CalibrationOptions", "calibrate"]
