"""TensorRT 10, 11 and TensorRT for RTX behind one import boundary (`api.py`)."""
