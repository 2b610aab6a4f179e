"""The part of a model that serving runs for every user, as a program that needs torch and nothing of h2rec."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from h2rec import reference
from h2rec._files import writing
from h2rec.models import SequentialModel


class UserEncoder(nn.Module):
    """The user vector at the end of each sequence, in operators that ``torch.export`` can trace.

    Args:
        model: what is to be served; its weights are shared.
    """

    def __init__(self, model: SequentialModel) -> None:
        super().__init__()
        self.model = model
        # torch.export unrolls a GRU over its steps, so their number must be known; others take any number.
        self.pads = any(isinstance(module, nn.GRU) for module in model.modules())

    def forward(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        """``[B, T]`` padded on the right with ``num_items``, ``[B]`` -> ``[B, C]``.

        A sequence with an id out of range, or a length outside 1 .. T, gives a row of NaN.
        """
        num_positions = item_ids.shape[1]
        good = ((item_ids >= 0) & (item_ids <= self.model.num_items)).all(1)
        good = good & (lengths >= 1) & (lengths <= num_positions)
        if self.pads:
            free = self.model.max_length - num_positions
            item_ids = F.pad(item_ids, (0, free), value=self.model.padding_idx)
        users = self.model.encode(item_ids, lengths)  # [B, T, C]
        last = (lengths - 1).clamp(0, num_positions - 1)
        last = users.gather(1, last[:, None, None].expand(-1, 1, users.shape[2])).squeeze(1)
        return last.masked_fill(~good[:, None], torch.nan)


@torch.no_grad()
def export_user_encoder(model: SequentialModel, path: Path) -> ExportedProgram:
    """Writes `UserEncoder` as a ``torch.export`` package, our operators decomposed to ATen's.

    Any B and T from 1 on, T up to ``model.max_length``; int64 inputs on the CPU. ``torch.export.load(path).module()``
    runs it.
    """
    encoder = UserEncoder(model.requires_grad_(False)).eval()
    example = torch.zeros(2, min(2, model.max_length), dtype=torch.int64), torch.ones(2, dtype=torch.int64)
    batch = Dim("B", min=1)
    length = Dim("T", min=1, max=model.max_length) if model.max_length > 1 else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what torch.export itself does to a GRU, and its pickled tree
        program = torch.export.export(
            encoder, example, dynamic_shapes={"item_ids": {0: batch, 1: length}, "lengths": {0: batch}}
        ).run_decompositions({torch.ops.h2rec.harmonized_embedding.default: reference.harmonized_embedding})
        with writing(path):
            torch.export.save(program, path)
    return program


def check_compiler() -> None:
    """Refuses ``aot`` where its C++ cannot be compiled, if this torch can tell beforehand.

    Raises:
        ValueError: no C++ compiler.
    """
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
    except ImportError:  # a private name
        return
    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise ValueError(f"aot: expected a C++ compiler (CXX names one), got none: {error}") from error


def compile_user_encoder(program: ExportedProgram, path: Path) -> None:
    """Compiles what `export_user_encoder` gave by AOTInductor, for processors with this one's vector instructions.

    ``torch._inductor.aoti_load_package(path)`` runs it. It does not check its inputs: T must not exceed the model's
    ``max_length``.
    """
    with warnings.catch_warnings(), writing(path):
        warnings.simplefilter("ignore")
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
