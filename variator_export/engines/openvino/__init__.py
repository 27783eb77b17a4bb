"""OpenVINO on CPUs, in float32 and in bfloat16."""
