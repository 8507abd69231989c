"""Triton kernels, installed as `lopt.kernels`. Nothing here is imported unless a Triton backend is used."""
