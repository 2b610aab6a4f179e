"""What all operators refuse alike."""

import numpy as np
import pytest
import torch

from h2rec import ops

IDS, CODES = torch.arange(4), torch.zeros(4, 2, dtype=torch.int64)
BOOKS, TABLE = torch.ones(2, 5, 3), torch.ones(4, 3)
ARGUMENTS = {
    ops.residual_quantize: {"x": TABLE, "codebooks": BOOKS},
    ops.harmonized_embedding: {"item_ids": IDS, "codes": CODES, "codebooks": BOOKS, "hash_table": TABLE},
    ops.alignment_loss: {
        "hash_emb": TABLE,
        "semantic_emb": TABLE,
        "item_ids": IDS,
        "codes": CODES,
        "min_shared_codes": 1,
        "pair_index": IDS[None, :2].repeat(2, 1),
        "pair_weight": torch.ones(2),
    },
    ops.score_topk: {"queries": TABLE, "items": TABLE, "k": 1, "exclude": CODES},
}
TENSORS = [
    (operator, name)
    for operator, arguments in ARGUMENTS.items()
    for name, value in arguments.items()
    if isinstance(value, torch.Tensor)
]


@pytest.mark.parametrize(
    ("operator", "name"), TENSORS, ids=[f"{operator.__name__}-{name}" for operator, name in TENSORS]
)
def test_an_array_is_no_tensor(operator, name):
    arguments = ARGUMENTS[operator]
    operator(**arguments)
    message = rf"^{name}(\[0\])? must be a tensor, got ndarray$"
    with pytest.raises(TypeError, match=message):
        operator(**{**arguments, name: np.asarray(arguments[name])})
