"""TorchRec's quantized embedding collections, with embpack's bytes in them.

A TorchRec user gets the paper's search with nothing else changed:

    import embpack.torchrec

    model.ebc = embpack.torchrec.quantize(model.ebc)  # in place of TorchRec's quantization by minimum and maximum

TorchRec looks indices up by FBGEMM, which sets one that is out of range to 0 **in the caller's KeyedJaggedTensor**,
pools row 0 and says so on stderr alone; embpack.TableGroup raises IndexError.

Tables that one machine's memory does not hold are sharded by TorchRec, with Sharder in place of its own sharder.
"""

from embpack.errors import MissingExtraError

try:
    from embpack.torchrec.collections import from_tables, quantize, to_tables
    from embpack.torchrec.sharding import Sharder
except ImportError as error:
    # TorchRec's own requirements name FBGEMM for GPUs, which overwrites the one for CPUs: no extra can have it.
    what = "TorchRec (pip install --no-deps torchrec==1.9.2) and what it runs on"
    raise MissingExtraError("embpack.torchrec", what, "torchrec") from error

__all__ = ["Sharder", "from_tables", "quantize", "to_tables"]
