"""The genotypes that a search has asked for: an exact set that takes little more than their genes."""

from array import array


class Seen:
    """A set of keys of `size` bytes each. Keys lie one after the other, found by hashing with open addressing."""

    def __init__(self, size: int):
        self._size = size
        self._keys = bytearray()
        self._count = 0
        self._slots = array("q", bytes(8 * 1024))  # 1 + the number of a key; 0: free. At most half of them are taken

    def __len__(self) -> int:
        return self._count

    def __contains__(self, key: object) -> bool:
        assert isinstance(key, bytes)
        return self._slots[self._slot(key)] != 0

    def add(self, key: bytes) -> None:
        """Adds `key`, unless it is there."""
        assert len(key) == self._size
        slot = self._slot(key)
        if self._slots[slot]:
            return
        self._keys += key
        self._count += 1
        self._slots[slot] = self._count
        if 2 * self._count > len(self._slots):
            self._slots = array("q", bytes(16 * len(self._slots)))
            for number in range(self._count):
                self._slots[self._slot(self._key(number))] = number + 1

    def _key(self, number: int) -> bytes:
        return bytes(self._keys[number * self._size : (number + 1) * self._size])

    def _slot(self, key: bytes) -> int:
        """Where `key` is, or would be put."""
        mask = len(self._slots) - 1
        slot = hash(key) & mask
        while (number := self._slots[slot]) and self._key(number - 1) != key:
            slot = (slot + 1) & mask
        return slot
