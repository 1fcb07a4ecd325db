"""Both towers as programs without this package: graphs of ONNX, and programs of torch.export."""
