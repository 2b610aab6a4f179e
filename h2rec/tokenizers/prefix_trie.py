"""Which codes may follow which, and the items at the end: for decoding that only gives IDs that exist."""

import torch
from torch import Tensor

from h2rec.semantic_ids import SemanticIds


class PrefixTrie:
    """The tuples of a catalog as a trie in sorted arrays; every call works on a batch of beams.

    A node of level l is a prefix of l + 1 codes that some item has; the root is node 0 before the first level. Memory
    is 8 bytes for each node and each item.

    Args:
        sids: semantic IDs.
        device: where the nodes and the codes of the beams are.
    """

    def __init__(self, sids: SemanticIds, device: torch.device | str | None = None) -> None:
        self.sizes = sids.codebook_sizes
        order, starts = (torch.from_numpy(array) for array in sids.groups())
        tuples = sids.codes[order[starts[:-1]]].long()  # [G, L], sorted
        self._keys = []  # level l: parent * K_l + code, ascending; the position is the node
        self._most_children = []  # level l: codes of this level that follow one node
        parent = torch.zeros(len(tuples), dtype=torch.int64)
        for level, size in enumerate(self.sizes):
            keys, parent = torch.unique_consecutive(parent * size + tuples[:, level], return_inverse=True)
            self._keys.append(keys.to(device))
            _, children = torch.unique_consecutive(keys // size, return_counts=True)
            self._most_children.append(int(children.max()) if len(children) else 0)
        self._order, self._starts = order.to(device), starts.to(device)

    def root(self, num_beams: int) -> Tensor:
        """The empty prefix, ``[num_beams]`` int64."""
        return torch.zeros(num_beams, dtype=torch.int64, device=self._order.device)

    def mask(self, level: int, nodes: Tensor) -> Tensor:
        """Which codes of ``level`` may follow ``nodes [B]``: bool ``[B, K_level]``; none after a node of -1."""
        keys, size = self._keys[level], self.sizes[level]
        start = (nodes * size).unsqueeze(1)
        # The children of a node follow each other.
        place = torch.searchsorted(keys, start) + torch.arange(
            self._most_children[level], device=nodes.device
        )
        codes = keys[place.clamp_max(len(keys) - 1)] - start
        codes = codes.where((place < len(keys)) & (codes >= 0) & (codes < size), size)
        mask = torch.zeros(len(nodes), size + 1, dtype=torch.bool, device=nodes.device)
        return mask.scatter_(1, codes, True)[:, :size]

    def step(self, level: int, nodes: Tensor, codes: Tensor) -> Tensor:
        """The nodes after ``codes [B]`` of ``level``, ``[B]`` int64; -1 where no item goes on like this."""
        size = self.sizes[level]
        found = self._find(self._keys[level], nodes * size + codes)
        return found.where((nodes >= 0) & (codes >= 0) & (codes < size), -1)

    def items(self, node: int) -> Tensor:
        """The items of a node of the last level, ascending."""
        if node < 0:
            return self._order[:0]
        return self._order[self._starts[node] : self._starts[node + 1]]

    @staticmethod
    def _find(keys: Tensor, wanted: Tensor) -> Tensor:
        if not len(keys):
            return torch.full_like(wanted, -1)
        place = torch.searchsorted(keys, wanted.contiguous()).clamp_max(len(keys) - 1)
        return place.where(keys[place] == wanted, -1)
