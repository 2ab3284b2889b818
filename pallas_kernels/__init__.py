"""Kernels for JAX: arrays in, arrays out.

Each subpackage is one operation with several implementations that agree with its ``reference``;
``pallas_kernels.dispatch`` chooses between them by the device for which the program is lowered.
"""
