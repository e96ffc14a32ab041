"""embpack against its peers, side by side: ``python -m benchmarks.quantize --help``, ``.lookup``, ``.loss``."""
