"""Files that are spoiled at random: bytes of any file, values of JSON, arrays of an npz file and of safetensors."""

import copy
import io
import json
import struct
import zipfile
from typing import Any

import numpy as np

VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e308),
    *(float("nan"), float("inf"), -float("inf")),
    *("", "a", "\x1b[2J", "\udcff", "../../../etc/passwd", "/", "\0", "[/red]", "$\\foo$", "x" * 5000),
    *([], {}, [[]], [1, "a", None], {"class": "os.system"}, {"name": "os.system"}, {"class": ["a"]}, {"name": 3}),
]
SHAPES = [(), (0,), (1,), (3, 0), (2, 2), (10**6,), (10**13,), (2**62, 4), (-1,), (1,) * 40, (24, 8, 8, 1), (24,)]
TYPES = ["<f4", "<f8", ">f4", "<f2", "|u1", "<i8", "<u8", "|b1", "<c16", "<U3", "|S3", "|O", "<M8[s]", "|V5"]
HEAD = 10  # bytes before the header of an npy file


def mutated_bytes(data, rng):
    """Bits flipped, a block cut out, repeated, exchanged or filled, or the end cut off."""
    if not data:
        return bytes(rng.integers(0, 256, 8, np.uint8))
    found = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        start, stop = sorted(rng.integers(0, len(found) + 1, 2))
        stop = min(stop, start + 64)
        block = found[start:stop]
        kind = rng.integers(6)
        if kind == 0 and found:
            for place in rng.integers(0, len(found), 4):
                found[place] ^= 1 << rng.integers(8)
        elif kind == 1:
            del found[start:]
        elif kind == 2:
            found[stop:stop] = block * int(rng.integers(1, 4))
        elif kind == 3:
            del found[start:stop]
        elif kind == 4:
            found[start:stop] = bytes([rng.choice([0, 255, 127, 91])]) * len(block)
        else:
            found[start:stop] = bytes(rng.integers(0, 256, len(block), np.uint8))
    return bytes(found)


def mutated_tree(tree, rng):
    """JSON data with a value, a name or a part of it exchanged, left out, repeated, or nested deep."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.integers(1, 4)):
        places = list(_places(tree))
        if not places:
            return VALUES[rng.integers(len(VALUES))]
        holder, key = places[rng.integers(len(places))]
        kind = rng.integers(8)
        if kind < 3:
            holder[key] = copy.deepcopy(VALUES[rng.integers(len(VALUES))])
        elif kind == 3:
            del holder[key]
        elif kind == 4:
            other, place = places[rng.integers(len(places))]
            holder[key] = copy.deepcopy(other[place])
        elif kind == 5 and isinstance(holder, dict):
            holder[str(VALUES[rng.integers(len(VALUES))])] = holder.pop(key)
        elif kind == 6:
            for _ in range(int(rng.choice([2, 30, 300]))):
                holder[key] = [holder[key]] if rng.random() < 0.5 else {"a": holder[key]}
        elif isinstance(holder, list):
            holder.append(holder[key])
        if len(str(tree)) > 10**6:
            break
    return tree


def _places(tree):
    """All places below: container and key."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield tree, key
        yield from _places(value)


def mutated_json(data, rng):
    """The text of JSON data that was spoiled, or spoiled text; so are the lines of JSON."""
    if rng.random() < 0.2:
        return mutated_bytes(data, rng)
    lines = data.decode().splitlines() if data[:1] == b"{" and b"\n{" in data else [data.decode()]
    place = rng.integers(len(lines))
    lines[place] = json.dumps(mutated_tree(json.loads(lines[place]), rng))
    return "\n".join(lines).encode()


def npy(array, rng):
    """A file of one array, whose header may promise something else."""
    file = io.BytesIO()
    np.save(file, array)
    data = file.getvalue()
    if rng.random() < 0.5:
        return data
    shape, kind = SHAPES[rng.integers(len(SHAPES))], TYPES[rng.integers(len(TYPES))]
    if rng.random() < 0.5:
        shape, kind = array.shape, kind
    header = f"{{'descr': '{kind}', 'fortran_order': {rng.random() < 0.2}, 'shape': {shape}, }}".encode()
    length = struct.unpack("<H", data[8:HEAD])[0]
    return data[:8] + struct.pack("<H", len(header)) + header + data[HEAD + length :]


def mutated_npz(data, rng):
    """An npz file with an array of another type or shape, or content; one left out, added, or replaced by bytes."""
    if rng.random() < 0.25:
        return mutated_bytes(data, rng)
    with np.load(io.BytesIO(data)) as file:
        arrays = dict(file)
    members = {}
    chosen = list(arrays)[rng.integers(len(arrays))]
    for name, array in arrays.items():
        kind = rng.integers(8) if name == chosen else -1
        if kind == 0:
            continue
        if kind == 1 and array.dtype.kind in "fiub":
            array = array.astype(rng.choice(["f2", "f8", "c8", "U3", "i1", "?"]))
        elif kind == 2:
            array = array[..., None] if rng.random() < 0.5 else array.reshape(-1)
        elif kind == 3:
            array = array[: len(array) // 2] if array.ndim else array
        elif kind == 4 and array.dtype.kind in "fiu" and array.size:
            array = array.copy()
            array.reshape(-1)[rng.integers(array.size)] = rng.choice([0, 1, 127])
        elif kind == 5 and array.dtype.kind == "f":
            array = np.where(rng.random(array.shape) < 0.1, rng.choice([np.nan, np.inf, -1e30]), array)
        members[name] = npy(array, rng) if kind == 6 else _plain(array)
        if kind == 7:
            members[name] = bytes(rng.integers(0, 256, 80, np.uint8))
    if rng.random() < 0.1:
        members["../" * 5 + "above"] = members.get(chosen, b"")
    return zipped(members, rng)


def _plain(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def zipped(members, rng):
    """The members as an npz file; a few are in it twice, and some are compressed in other ways."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            way = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
            archive.writestr(f"{name}.npy", content, int(way))
    return file.getvalue()


def mutated_safetensors(data, rng):
    """A safetensors file whose header or content is spoiled."""
    if rng.random() < 0.3:
        return mutated_bytes(data, rng)
    length = struct.unpack("<Q", data[:8])[0]
    header = json.dumps(mutated_tree(json.loads(data[8 : 8 + length]), rng)).encode()
    told = len(header) if rng.random() < 0.9 else int(rng.choice([0, 2**40, len(header) - 1]))
    return struct.pack("<Q", told) + header + data[8 + length :]
