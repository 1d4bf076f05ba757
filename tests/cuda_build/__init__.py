"""The CUDA kernels compiled without a GPU: by nvcc through CMake, with what ptxas says checked, and by NVRTC."""
