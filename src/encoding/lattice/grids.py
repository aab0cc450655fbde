"""Writes grids.bin, the lattice points of llama.cpp's i-quants, from llama.cpp's header.

    python grids.py PATH/TO/llama.cpp/ggml/src/ggml-common.h

grids.bin holds the tables below one after the other. A point is 16 bits, little-endian: for each
of its 4 or 8 elements, the first in the lowest bits, the index of its level (4 or 2 bits).
"""

import pathlib
import re
import sys

# table in the header: (points, elements of a point, levels)
TABLES = {
    "iq2xxs_grid": (256, 8, (8, 25, 43)),
    "iq2xs_grid": (512, 8, (8, 25, 43)),
    "iq2s_grid": (1024, 8, (8, 25, 43)),
    "iq3xxs_grid": (256, 4, (4, 12, 20, 28, 36, 44, 52, 62)),
    "iq3s_grid": (512, 4, (1, 3, 5, 7, 9, 11, 13, 15)),
    "iq1s_grid": (2048, 8, (255, 0, 1)),
}


def main(header):
    text = pathlib.Path(header).read_text()
    out = bytearray()
    for name, (count, elements, levels) in TABLES.items():
        begin = rf"GGML_TABLE_BEGIN\(uint\d+_t, {name}, \w+\)"
        table = re.search(begin + r"(.*?)GGML_TABLE_END", text, re.DOTALL).group(1)
        points = [int(x, 16) for x in re.findall(r"0x[0-9a-f]+", table)]
        assert len(points) == count, (name, len(points))
        for point in points:
            places = (levels.index(byte) for byte in point.to_bytes(elements, "little"))
            bits = 16 // elements
            out += sum(place << bits * i for i, place in enumerate(places)).to_bytes(2, "little")
    (pathlib.Path(__file__).parent / "grids.bin").write_bytes(out)


main(sys.argv[1])
