"""The kernels' own .cu files on the CPU: one fiber per CUDA thread, strict barriers, poisoned
memory. For tests.
"""
