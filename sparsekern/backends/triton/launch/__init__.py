"""Launches: operands checked and shaped, grid and tile handed to a kernel. Importing one of these imports Triton."""
