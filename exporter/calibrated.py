"""The quantised graphs of an output folder in its report."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from export_vq.bundle import Bundle
from export_vq.files import sha256, write_text
from export_vq.records import CalibrationReport, RunReport
from export_vq.report import render_html


def calibrations(folder: Path) -> tuple[CalibrationReport, ...]:
    """What `calibrate` found, for each precision that was made of the model.onnx that is there now."""
    source = folder / "model.onnx"
    current = sha256(source) if source.is_file() else ""
    found = [CalibrationReport.load(file) for file in sorted(folder.glob("*/calibration.json"))]
    return tuple(report for report in found if report.source_sha256 == current)


def refresh_report(folder: Path) -> bool:
    """Put them into the report that the main job wrote; False where it wrote none."""
    bundle = Bundle(folder)
    if not bundle.report_json.is_file():
        return False
    report = dataclasses.replace(RunReport.load(bundle.report_json), calibrations=calibrations(folder))
    report.save(bundle.report_json)
    write_text(bundle.report_html, render_html(report))
    return True
