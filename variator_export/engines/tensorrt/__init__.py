"""TensorRT 10, TensorRT 11 and TensorRT for RTX behind one import boundary (`api.py`)."""
