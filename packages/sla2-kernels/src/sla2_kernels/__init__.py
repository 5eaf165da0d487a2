"""Kernels of sparse-linear attention: CUDA sources compiled by NVRTC, the same sources emulated,
and numba for the CPU.
"""
