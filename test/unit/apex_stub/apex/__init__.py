"""A stand-in for NVIDIA's apex as it was while it had amp (see amp.py)."""
