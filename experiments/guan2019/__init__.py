"""Guan et al. 2019, Post-Training 4-bit Quantization on Embedding Tables: ``python -m experiments.guan2019 --help``."""
