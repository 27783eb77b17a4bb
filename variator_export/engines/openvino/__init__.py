"""OpenVINO on CPUs, in float32, bfloat16 and int8-static."""
