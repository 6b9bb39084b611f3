"""Cut the part of Fashion-MNIST that the tests read, from an installed copy that is the published one.

    apt-get install dataset-fashion-mnist
    python tools/cut_fashion_mnist.py        # writes tests/fashion-mnist/t10k-*.gz

Debian packs the files anew without gzip's name and time fields. Putting those fields back must give the md5 sums of the
originals, which torchvision checks as well: that ties the checksums in `fewstep.data.fashion_mnist` to the published files.
"""

import gzip
import hashlib
import struct
from pathlib import Path

from fewstep.data.fashion_mnist import PUBLISHED, installed_folder

IMAGES = 500  # the first ones, in the published order
FOLDER = Path(__file__).parent.parent / "tests" / "fashion-mnist"
# File -> the md5 sum of the original .gz (github.com/zalandoresearch/fashion-mnist), the time in its gzip header.
ORIGINALS = {
    "train-images-idx3-ubyte.gz": ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", 1504176606),
    "train-labels-idx1-ubyte.gz": ("25c81989df183df01b3e8a0aad5dffbe", 1504176606),
    "t10k-images-idx3-ubyte.gz": ("bef4ecab320f06d8554ea6380940ec79", 1504176627),
    "t10k-labels-idx1-ubyte.gz": ("bb300cfdad3c16e7a12a480ee83cd310", 1504176627),
}


def checked(file: str) -> bytes:
    """The unpacked content of an installed file, which must be the published one by both sums."""
    packed = (installed_folder() / file).read_bytes()
    md5, time = ORIGINALS[file]
    name = file.removesuffix(".gz").encode()
    original = struct.pack("<4BI2B", 0x1F, 0x8B, 8, 8, time, 0, 3) + name + b"\0" + packed[10:]
    assert hashlib.md5(original).hexdigest() == md5, f"{file} is not the published file in Debian's packing"
    content = gzip.decompress(packed)
    assert hashlib.sha256(content).hexdigest() == PUBLISHED[file][1], f"the sha256 of {file} in fewstep is wrong"
    return content


def main() -> None:
    assert ORIGINALS.keys() == PUBLISHED.keys()
    contents = {file: checked(file) for file in ORIGINALS}
    FOLDER.mkdir(exist_ok=True)
    for file in (name for name in contents if name.startswith("t10k")):
        _, *rest = PUBLISHED[file][0]  # the sizes of one entry
        start, length = 4 + 4 * (1 + len(rest)), IMAGES
        for size in rest:
            length *= size
        header = struct.pack(f">HBB{1 + len(rest)}I", 0, 8, 1 + len(rest), IMAGES, *rest)
        part = header + contents[file][start : start + length]
        (FOLDER / file).write_bytes(gzip.compress(part, mtime=0))
        print(f"{file}: {IMAGES} entries, sha256 {hashlib.sha256(part).hexdigest()}")


if __name__ == "__main__":
    main()
