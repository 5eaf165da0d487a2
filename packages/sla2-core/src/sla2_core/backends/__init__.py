"""Where the operator is computed: CPU kernels, CUDA kernels, plain torch."""
