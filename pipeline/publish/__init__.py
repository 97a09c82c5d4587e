"""Publishing: the model with its card and results, ONNX export, jobs, the Space, verification."""
