"""TensorFlow's checkpoints without TensorFlow: `model.ckpt.index` and `model.ckpt.data-…`.

A "tensor bundle". The index is a sorted table as LevelDB writes them, from the name of a tensor to
a small message of protocol buffers that says where it lies in the data files; these hold the plain
numbers one after another. tensorflow/tensorflow@v2.21.0, `core/util/tensor_bundle`, `core/lib/io`
(`table`, `block`, `format`), and `core/protobuf/tensor_bundle.proto`.

TensorFlow takes longer to install than all of samjax, to read one file of a teacher.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MAGIC = 0xDB4775248B80FB57.to_bytes(8, "little")  # the last bytes of a table
_FOOTER = 48
_TRAILER = 5  # after each block: how it is compressed, and its checksum
_TYPES = {  # of `types.proto`, those that checkpoints have
    1: "<f4",
    2: "<f8",
    3: "<i4",
    4: "u1",
    5: "<i2",
    6: "i1",
    9: "<i8",
    10: "?",
    19: "<f2",
}


class Entry(NamedTuple):
    """Where a tensor lies: `size` bytes of the data file `shard`, from `offset` on."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int


class Bundle:
    """The tensors of a checkpoint: names and shapes at once, values when asked for.

    Args:
        prefix: what the files begin with, such as `r50_2x_sk1/model.ckpt-250228`.

    Raises:
        ValueError: the index is damaged or of another kind. OSError.
    """

    def __init__(self, prefix: str | Path) -> None:
        prefix = Path(prefix)
        index = prefix.with_name(f"{prefix.name}.index")
        try:
            table = _table(index.read_bytes())
            header = dict(_fields(table.pop(b"")))
            entries = {key.decode(): _entry(value) for key, value in table.items()}
        except (LookupError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(f"{index.name} is damaged ({error!r})") from error
        if header.get(2):
            raise ValueError(f"{index.name} is of a machine with the highest byte first")
        self.entries = entries
        self._files = [
            prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{header[1]:05d}")
            for shard in range(int(header[1]))
        ]

    def read(self, name: str) -> np.ndarray:
        """A tensor; its checksum is compared.

        Raises:
            ValueError: it is damaged, cut off, or holds no numbers. OSError.
        """
        entry = self.entries[name]
        if entry.dtype not in _TYPES:
            raise ValueError(f"{name} is of TensorFlow's type {entry.dtype}, which is not read")
        dtype = np.dtype(_TYPES[entry.dtype])
        if entry.size != math.prod(entry.shape) * dtype.itemsize:
            raise ValueError(f"{name}: {entry.size} bytes for {dtype} {entry.shape}")
        with self._files[entry.shard].open("rb") as file:
            file.seek(entry.offset)
            content = file.read(entry.size)
        if len(content) < entry.size:
            raise ValueError(f"{self._files[entry.shard].name} ends within {name}")
        if masked(crc32c(content)) != entry.checksum:
            raise ValueError(f"{name}: its checksum is another one")
        return np.frombuffer(content, dtype).reshape(entry.shape)


def masked(checksum: int) -> int:
    """How checksums are stored: turned by 15 bits, plus a constant."""
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _bytewise() -> np.ndarray:
    """What a byte at the end of the register makes of it, for each byte."""
    states = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        states = states >> 1 ^ np.where(states & 1, np.uint32(0x82F63B78), np.uint32(0))
    return states


_TABLE = _bytewise()
_LANES = 4096


def crc32c(content: bytes) -> int:
    """The checksum with Castagnoli's polynomial (RFC 3720, appendix B.4).

    It is linear, so that many pieces of a long content are taken at once and their registers then
    joined: each is moved on over the pieces behind it, as if these were zeros.
    """
    values = np.frombuffer(content, np.uint8)
    if len(values) < 16 * _LANES:
        table, register = _TABLE.tolist(), 0xFFFFFFFF
        for byte in content:
            register = table[(register ^ byte) & 0xFF] ^ register >> 8
        return register ^ 0xFFFFFFFF
    doublings = max(len(values) - 1, 1).bit_length() - (_LANES.bit_length() - 1)
    # Zeros in front leave an empty register as it is; its first value goes into the content.
    padded = np.zeros(_LANES << doublings, np.uint8)
    padded[-len(values) :] = values
    padded[-len(values) :][:4] ^= 0xFF
    registers = np.zeros(_LANES, np.uint32)
    for column in np.ascontiguousarray(padded.reshape(_LANES, -1).T):
        registers = _TABLE[(registers ^ column) & 0xFF] ^ registers >> 8
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    move = _TABLE[bits & 0xFF] ^ bits >> 8  # what one zero makes of each bit
    for _ in range(doublings):
        move = _moved(move, move)
    while len(registers) > 1:
        registers = _moved(registers[::2], move) ^ registers[1::2]
        move = _moved(move, move)
    return int(registers[0]) ^ 0xFFFFFFFF


def _moved(registers: np.ndarray, move: np.ndarray) -> np.ndarray:
    """A linear map, given by what it makes of each bit, of each register."""
    result = np.zeros_like(registers)
    for bit in range(32):
        result ^= np.where(registers >> np.uint32(bit) & 1, move[bit], np.uint32(0))
    return result


def _table(content: bytes) -> dict[bytes, bytes]:
    """All keys and values."""
    if content[-len(MAGIC) :] != MAGIC or len(content) < _FOOTER:
        raise ValueError("the index is cut off, or of another kind of file")
    footer = content[-_FOOTER:]
    _, _, at = _place(footer, 0)  # of what describes the table, which is nothing
    found: dict[bytes, bytes] = {}
    for _, place in _block(content, *_place(footer, at)[:2]):
        found.update(_block(content, *_place(place, 0)[:2]))
    return found


def _block(content: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values; a key is said by how much it shares with the one before, and the rest."""
    block, trailer = content[offset : offset + size], content[offset + size :][:_TRAILER]
    if masked(crc32c(block + trailer[:1])) != int.from_bytes(trailer[1:], "little"):
        raise ValueError("the index is damaged: the checksum of a block is another one")
    if trailer[0]:
        raise ValueError("the index is compressed, which TensorFlow's own are not")
    restarts = int.from_bytes(block[-4:], "little")  # places without sharing, for a quick search
    end, at, key = size - 4 * (restarts + 1), 0, b""
    while at < end:
        shared, at = _varint(block, at)
        own, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + block[at : at + own]
        yield key, block[at + own : at + own + length]
        at += own + length


def _place(content: bytes, at: int) -> tuple[int, int, int]:
    """Offset and size of a block, and where what follows begins."""
    offset, at = _varint(content, at)
    size, at = _varint(content, at)
    return offset, size, at


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and where what follows begins."""
    number = shift = 0
    while True:
        byte = content[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number, at


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value (a number, or bytes) of each field of a protocol buffer."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        match tag & 7:
            case 0:
                value, at = _varint(message, at)
            case 2:
                length, at = _varint(message, at)
                value, at = message[at : at + length], at + length
            case 1 | 5 as kind:
                length = 8 if kind == 1 else 4
                value, at = int.from_bytes(message[at : at + length], "little"), at + length
            case kind:
                raise LookupError(f"a field of kind {kind}")
        yield tag >> 3, value


def _entry(message: bytes) -> Entry:
    found = dict(_fields(message))
    if 7 in found:
        raise LookupError("a tensor in several slices")
    sides = [value for number, value in _fields(found.get(2, b"")) if number == 2]
    shape = tuple(dict(_fields(side)).get(1, 0) for side in sides)
    dtype, shard, offset, size, checksum = (found.get(number, 0) for number in (1, 3, 4, 5, 6))
    return Entry(dtype, shape, shard, offset, size, checksum)
