"""export-vq: deploy language models whose output layer is a VQ-Logits head.

The public verbs and records, loaded on first use so that `import export_vq` is cheap and needs nothing installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "load_model": "load",
    "load_dense": "load",
    "save_model": "load",
    "LoadedModel": "load",
    "VQHead": "head",
    "HeadSpec": "records",
    "export_onnx": "graph",
    "ExportOptions": "graph",
    "calibrate": "calibration",
    "CalibrationOptions": "calibration",
    "build_engine": "engine",
    "EngineOptions": "engine",
    "load_engine": "plan",
    "stream": "generate",
    "TokenEvent": "generate",
    "DecodingOptions": "decoding",
    "TextModel": "textmodel",
    "OrtRunner": "runners",
    "TorchRunner": "runners",
    "TrtRunner": "trt_runner",
    "check_parity": "parity",
    "run_benchmark": "bench",
    "bench_folder": "folder_bench",
    "compress_model": "compress",
    "finetune": "tuning",
    "FinetuneOptions": "tuning",
    "quality_report": "quality",
    "trim_vocabulary": "trim",
    "tie_embedding": "load",
    "VQEmbedding": "embedding",
    "CompressOptions": "compress",
    "run_pipeline": "pipeline",
    "RunOptions": "pipeline",
    "UserError": "errors",
    "CheckFailed": "errors",
}

__all__ = [
    "CalibrationOptions",
    "CheckFailed",
    "CompressOptions",
    "DecodingOptions",
    "EngineOptions",
    "ExportOptions",
    "FinetuneOptions",
    "HeadSpec",
    "LoadedModel",
    "OrtRunner",
    "RunOptions",
    "TextModel",
    "TokenEvent",
    "TorchRunner",
    "TrtRunner",
    "UserError",
    "VQEmbedding",
    "VQHead",
    "bench_folder",
    "build_engine",
    "calibrate",
    "check_parity",
    "compress_model",
    "export_onnx",
    "finetune",
    "load_dense",
    "load_engine",
    "load_model",
    "quality_report",
    "run_benchmark",
    "run_pipeline",
    "save_model",
    "stream",
    "tie_embedding",
    "trim_vocabulary",
]

if TYPE_CHECKING:
    from export_vq.bench import run_benchmark
    from export_vq.calibration import CalibrationOptions, calibrate
    from export_vq.compress import CompressOptions, compress_model
    from export_vq.decoding import DecodingOptions
    from export_vq.embedding import VQEmbedding
    from export_vq.engine import EngineOptions, build_engine
    from export_vq.errors import CheckFailed, UserError
    from export_vq.folder_bench import bench_folder
    from export_vq.generate import TokenEvent, stream
    from export_vq.graph import ExportOptions, export_onnx
    from export_vq.head import VQHead
    from export_vq.load import LoadedModel, load_dense, load_model, save_model, tie_embedding
    from export_vq.parity import check_parity
    from export_vq.pipeline import RunOptions, run_pipeline
    from export_vq.plan import load_engine
    from export_vq.quality import quality_report
    from export_vq.records import HeadSpec
    from export_vq.runners import OrtRunner, TorchRunner
    from export_vq.textmodel import TextModel
    from export_vq.trim import trim_vocabulary
    from export_vq.trt_runner import TrtRunner
    from export_vq.tuning import FinetuneOptions, finetune


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'export_vq' has no attribute {name!r}")
    return getattr(importlib.import_module(f"export_vq.{_HOME[name]}"), name)
