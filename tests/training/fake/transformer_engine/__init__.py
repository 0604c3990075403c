"""transformer-engine's layers in plain torch, so that fused blocks can be tested without a GPU.

Only what ``fastcpt.training.layers`` uses, with the same names, parameters and shapes.
"""
