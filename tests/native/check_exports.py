"""Fail if an object file of an instruction set exports anything but its unit's one object, or of too many names.

Whatever else it exported, even a weak copy of an inline function, the linker could take for other files too, and
then a CPU without that instruction set would run it.

Usage: check_exports.py BUILD   the folder of a build of the module
"""

import re
import subprocess
import sys
from pathlib import Path

OBJECTS = {
    "packing": "packing",
    "lookup": "lookups",
    "trellis_lookup": "trellis_lookups",
    "linear": "products",
    "trellis_linear": "trellis_products",
}
"""What each unit of native/units exports."""


def exported_symbols(object_file: Path) -> list[str]:
    """Names of the global, weak and unique symbols that the file defines."""
    command = ["nm", "--extern-only", "--defined-only", "--format=posix", str(object_file)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listing.splitlines() if line]


def find_wrong(object_file: Path) -> str | None:
    """Say what is wrong with an object file, .../embpack_ISA.dir/native/units/UNIT.cpp.o; None if nothing is."""
    isa = re.search(r"embpack_(\w+)\.dir", str(object_file))
    assert isa is not None
    name = OBJECTS[object_file.name.partition(".")[0]]
    wanted = f"_ZN7embpack{len(isa[1])}{isa[1]}{len(name)}{name}E"
    found = exported_symbols(object_file)
    if found == [wanted]:
        return None
    return f"{object_file} exports {', '.join(found) or 'nothing'}; it must export {wanted} and nothing else"


def main() -> str | None:
    """Return what is wrong, or None."""
    object_files = sorted(Path(sys.argv[1]).glob("CMakeFiles/embpack_*.dir/native/units/*.o"))
    if not object_files:
        return f"{sys.argv[1]} has no objects of instruction sets; give the folder of a build of the module"
    wrong = [text for file in object_files if (text := find_wrong(file))]
    if not wrong:
        sys.stdout.write(f"{len(object_files)} objects of instruction sets export their kernels and nothing else\n")
    return "\n".join(wrong) or None


if __name__ == "__main__":
    sys.exit(main())
