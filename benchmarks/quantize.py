"""Packing to 4 bits: speed and loss beside PyTorch and FBGEMM, and the memory that a streaming run takes."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.progress import track

from benchmarks import isas
from benchmarks.cores import watch
from benchmarks.harness import Timing, describe_machine, race
from benchmarks.peers import Peer, load_peers
from benchmarks.races import Sizes, make_workloads
from benchmarks.report import RaceResult, Report, print_report
from benchmarks.streaming import MemoryUse, measure_streaming
from embpack.cli import show

DIMS = (16, 32, 64, 128, 256, 512)
IN_CACHE_BYTES, PAST_CACHE_BYTES = 8 << 20, 256 << 20
FULL = Timing(rounds=15, sample_seconds=0.02)
STREAMED_METHODS = ("asym", "greedy")
QUICK_DIMS = (16, 64)
QUICK = Timing(rounds=3, sample_seconds=0.005)

EPILOG = f"""
Everybody packs the same tables of normal values, float32 to 4 bits with float16 scale and bias, one thread,
output allocated inside the timed call. Answers are compared first: asym must give the same bytes, and no row
that greedy or optimal packs may lose more than by PyTorch's greedy; trellis has rows of its own, which must lose less
all together, and the fitting of its codebook is timed too. Then contestants take turns. A ratio is our rate by
theirs within a round, which a busy machine changes less than the rates themselves. A goal is for the ratio: it is met
or missed, and nothing fails.
{isas.EPILOG}
  python -m benchmarks.quantize --quick --no-stream               a smoke test, in seconds
  python -m benchmarks.quantize --no-stream --dims 64 128         two widths only
  python -m benchmarks.quantize --json q.json --plot q.png        everything, some minutes; 5 GB in $TMPDIR
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantize",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="few widths and rounds, and no table past the cache")
    add("--dims", type=int, nargs="+", metavar="D", help=f"values a row (default: {_join(DIMS)})")
    add("--rounds", type=int, metavar="N", help=f"samples a contestant (default: {FULL.rounds})")
    add("--no-stream", action="store_true", help="leave out the memory of embpack.quantize_file")
    add("--stream-gb", type=float, default=4.0, metavar="GB", help="its table (default: %(default)s)")
    isas.add_isa_option(parser)
    add("--json", type=Path, metavar="PATH", help="write all figures there")
    add("--plot", type=Path, metavar="PATH.png", help="draw them there; needs matplotlib and d = 64")
    return parser.parse_args(arguments)


def _join(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


def run_races(options: argparse.Namespace) -> Report:
    """Run what the options ask for."""
    timing = QUICK if options.quick else FULL
    timing = Timing(options.rounds or timing.rounds, timing.sample_seconds)
    dims = options.dims or (QUICK_DIMS if options.quick else DIMS)
    sizes = Sizes(dims, (IN_CACHE_BYTES,) if options.quick else (IN_CACHE_BYTES, PAST_CACHE_BYTES))
    peers, left_out = load_peers()
    if options.isa:
        packers = [peer for peer in peers if isinstance(peer, Peer)]
        isas.require_held({peer.name: peer.isa("asym") for peer in packers})
    machine = describe_machine()
    methods = () if options.no_stream else STREAMED_METHODS

    def measure() -> tuple[list[RaceResult], list[MemoryUse]]:
        races = [
            RaceResult(workload.settings, race(workload, timing))
            for workload in track(make_workloads(sizes, peers), "Racing", console=show.errors)
        ]
        return races, [measure_streaming(method, options.stream_gb) for method in methods]

    (races, streaming), busyness = watch(measure)
    return Report(machine, busyness, left_out, races, streaming)


def main() -> None:
    """Run, print, write."""
    options = parse_arguments()
    if options.isa:
        isas.hold_to_avx2()
    report = run_races(options)
    print_report(report)
    if options.json:
        options.json.write_text(json.dumps(asdict(report), indent=2) + "\n")
    if options.plot:
        from benchmarks.plot import draw  # matplotlib is only for those who ask for a picture.

        draw(report, options.plot)


if __name__ == "__main__":
    main()
