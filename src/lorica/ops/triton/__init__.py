"""Twins of the hot ops for CUDA, written in Triton; loaded where `choose.twin` asks for one."""
