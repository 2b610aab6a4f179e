"""The examples of docs/layers.md run as they stand, in a folder of their own."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from h2rec import SemanticIds

PAGE = Path(__file__).parents[2] / "docs" / "layers.md"
SECTIONS = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
EXAMPLES = {
    section.splitlines()[0]: re.search(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE).group(1)
    for section in SECTIONS
    if "```python" in section
}
NEEDS = {
    "A decoder of Hugging Face transformers": "transformers",
    "SASRec of RePlay": "replay",
    "SASRec of RecTools": "rectools",
    "SASRec of RecBole": "recbole",
}
# What each example must have achieved.
LEARNS = "assert sum(losses[-3:]) < 0.5 * sum(losses[:3]), losses\n"
ACHIEVES = {
    "A decoder of Hugging Face transformers": LEARNS
    + "assert (next_items == (sequences[:, 7:8] + 3 * torch.arange(1, 4)) % 200).float().mean() > 0.9\n",
    "SASRec of RePlay": LEARNS,
    "SASRec of RecTools": """
expected = (sequences[:3, -1] + 3) % 200
best = recommended[recommended[Columns.Rank] == 1]
assert best[Columns.Item].tolist() == expected.tolist(), (recommended, expected)
""",
    "SASRec of RecBole": "assert losses[-1] < 0.5 * losses[0], losses\n",
    "Two towers": LEARNS + "assert table.grad is None\n",
    "Prefixes of semantic IDs": "assert embedding.hash_table.grad.is_sparse\n",
}


@pytest.mark.parametrize("title", EXAMPLES)
def test_example(title: str, tmp_path: Path):
    package = NEEDS.get(title)
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    codes = torch.randint(0, 16, (200, 3), generator=torch.Generator().manual_seed(0))
    SemanticIds(codes, codebook_sizes=(16, 16, 16)).save(tmp_path / "sids.safetensors")
    script = tmp_path / "example.py"
    script.write_text(f"import torch\ntorch.manual_seed(0)\n{EXAMPLES[title]}\n{ACHIEVES[title]}")
    # From elsewhere: transformers would take the checkout's folder kernels/ for the package of that name.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
