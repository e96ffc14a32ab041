"""Fail if the object file of an instruction set exports anything but its one object, `kernels` or `lookups`.

Whatever else it exported, even a weak copy of an inline function, the linker could take for other files too, and
then a CPU without that instruction set would run it.

Usage: check_exports.py NM ISA OBJECT
"""

import subprocess
import sys


def exported_symbols(nm: str, object_file: str) -> list[str]:
    """Names of the global, weak and unique symbols that the file defines."""
    listing = subprocess.run(
        [nm, "--extern-only", "--defined-only", "--format=posix", object_file],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [line.split()[0] for line in listing.splitlines() if line]


def main() -> str | None:
    """Return what is wrong, or None."""
    nm, isa, object_file = sys.argv[1:]
    allowed = [f"_ZN7embpack{len(isa)}{isa}7{name}E" for name in ("kernels", "lookups")]
    found = exported_symbols(nm, object_file)
    if len(found) != 1 or found[0] not in allowed:
        wanted = " or ".join(allowed)
        return f"{object_file} exports {', '.join(found) or 'nothing'}; it must export {wanted} and nothing else"
    return None


if __name__ == "__main__":
    sys.exit(main())
