"""The rivals: the code that a good PyTorch user writes without h2rec. No trick is left out on purpose."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ROWS = 4096  # the quickest of 1024, 4096 and 16384 with 256 codewords on a server CPU


def residual_quantize(x: Tensor, codebooks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Per level one `torch.addmm` for |c|^2 / 2 - <r, c>, then `argmin`: the |r|^2 of the distance is left out.

    x [N, D], codebooks L x [K, D] -> (quantized [N, D], codes [N, L] int64)
    """
    residual, codes = x, []
    for codebook in codebooks:
        half_norms = codebook.square().sum(dim=1) / 2  # [K]
        code = torch.addmm(half_norms, residual, codebook.T, alpha=-1).argmin(dim=1)
        residual = residual - F.embedding(code, codebook)
        codes.append(code)
    return x - residual, torch.stack(codes, dim=1)


def residual_quantize_in_chunks(x: Tensor, codebooks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The same, a few thousand vectors at a time: distances that stay in the cache are read back faster."""
    chunks = [residual_quantize(rows, codebooks) for rows in x.split(CHUNK_ROWS)]
    return torch.cat([quantized for quantized, _ in chunks]), torch.cat([codes for _, codes in chunks])


def harmonized_embedding(
    item_ids: Tensor, codes: Tensor, codebooks: Sequence[Tensor], hash_table: Tensor, *, sparse: bool = False
) -> tuple[Tensor, Tensor]:
    """Codes gathered, then one `F.embedding` per level, summed, and one for the table.

    item_ids [T], codes [num_items, L], codebooks L x [K, D], hash_table [R, D] -> (semantic [T, D], hashed [T, D])
    """
    item_codes = F.embedding(item_ids, codes)  # [T, L]
    semantic = F.embedding(item_codes[:, 0], codebooks[0])
    for level in range(1, len(codebooks)):
        semantic += F.embedding(item_codes[:, level], codebooks[level])
    return semantic, F.embedding(item_ids, hash_table, sparse=sparse)


def harmonized_embedding_bag(
    item_ids: Tensor, codes_in_stack: Tensor, stack: Tensor, hash_table: Tensor, *, sparse: bool = False
) -> tuple[Tensor, Tensor]:
    """The same with the codebooks stacked to one table: a single `F.embedding_bag` gathers and sums all levels.

    codes_in_stack [num_items, L]: rows of stack [L * K, D], in other words code + level * K.
    """
    rows = F.embedding(item_ids, codes_in_stack)  # [T, L]
    return F.embedding_bag(rows, stack, mode="sum"), F.embedding(item_ids, hash_table, sparse=sparse)


def alignment_loss(
    hash_emb: Tensor,
    semantic_emb: Tensor,
    item_ids: Tensor,
    codes: Tensor,
    min_shared_codes: int,
    temperature: float,
) -> Tensor:
    """Logits and positives as B x B matrices; positives by item id, or by at least `min_shared_codes` equal codes.

    hash_emb, semantic_emb [B, D], item_ids [B], codes [B, L] -> scalar
    """
    logits = F.normalize(hash_emb, dim=1) @ F.normalize(semantic_emb, dim=1).T / temperature  # [B, B]
    shared = torch.zeros_like(logits, dtype=torch.uint8)
    for code in codes.T:
        shared += code[:, None] == code
    positive = (item_ids[:, None] == item_ids) | (shared >= min_shared_codes)
    of_positives = logits.masked_fill(~positive, -torch.inf)
    rows = logits.logsumexp(dim=1) - of_positives.logsumexp(dim=1)
    columns = logits.logsumexp(dim=0) - of_positives.logsumexp(dim=0)
    return (rows.mean() + columns.mean()) / 2
