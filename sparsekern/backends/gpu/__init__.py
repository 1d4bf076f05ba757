"""What the families of GPU kernels share: problems, facts of GPUs, measured kernels, the choice, the passes."""
