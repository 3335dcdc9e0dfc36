"""The native libraries: kernels, ONNX Runtime custom ops, TensorRT plugin; how they are built, found and loaded."""
