import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from h2rec import SemanticIds
from h2rec.tokenizers import PrefixTrie

SIZES = (3, 4, 2)


@given(st.lists(st.tuples(*(st.integers(0, size - 1) for size in SIZES)), max_size=30))
def test_follows_exactly_the_prefixes_that_exist(rows):
    codes = torch.tensor(rows, dtype=torch.int32).reshape(-1, 3)
    trie = PrefixTrie(SemanticIds(codes, codebook_sizes=SIZES))

    def walk(prefix, nodes):
        level = len(prefix)
        if level == len(SIZES):
            expected = [item for item, row in enumerate(rows) if row == prefix]
            assert trie.items(int(nodes)).tolist() == expected
            return
        allowed = {row[level] for row in rows if row[:level] == prefix}
        assert trie.mask(level, nodes)[0].nonzero().flatten().tolist() == sorted(allowed)
        for code in range(SIZES[level]):
            after = trie.step(level, nodes, torch.tensor([code]))
            assert (int(after) >= 0) == (code in allowed)
            walk((*prefix, code), after)

    walk((), trie.root(1))


def test_a_batch_of_beams(device):
    codes = torch.tensor([[0, 1], [2, 0], [0, 3], [0, 1]])
    trie = PrefixTrie(SemanticIds(codes, codebook_sizes=(3, 4)), device)
    nodes = trie.step(0, trie.root(3), torch.tensor([0, 1, 2], device=device))
    assert (nodes >= 0).tolist() == [True, False, True]
    assert trie.mask(1, nodes).int().tolist() == [[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]
    ends = trie.step(1, nodes, torch.tensor([1, 0, 0], device=device))
    assert [trie.items(int(node)).tolist() for node in ends] == [[0, 3], [], [1]]


@pytest.mark.parametrize("code", [-1, 4])
def test_a_code_outside_the_level_leads_nowhere(code):
    codes = torch.tensor([[0, 3], [1, 0], [2, 3]])
    trie = PrefixTrie(SemanticIds(codes, codebook_sizes=(3, 4)))
    nodes = trie.step(0, trie.root(3), torch.tensor([0, 1, 2]))
    assert trie.step(1, nodes, torch.full((3,), code)).tolist() == [-1, -1, -1]
