"""The GPU half: the ONNX graph that becomes a TensorRT plan, the plan, and Triton's config for it.

Nothing here but `graph.py` and `native_config.py`, which run at build time, needs more than NumPy, onnx, TensorRT and
Polygraphy, so that a plan can be built in a small container on the node that will serve it.
"""
