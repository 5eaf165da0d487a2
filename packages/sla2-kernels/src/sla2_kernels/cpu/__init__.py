"""The operator on the CPU in numba: numpy arrays in and out, parallel over head and block. Nothing
compiles at import.
"""
