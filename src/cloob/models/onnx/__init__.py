"""Folders that ``cloob export --to onnx`` writes: checked, and run by onnxruntime without towers of torch's."""
