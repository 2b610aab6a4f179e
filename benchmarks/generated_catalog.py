"""A catalog of any size from a seed: content vectors in clusters, and users who stay with a topic for a while.

    python -m benchmarks.generated_catalog FOLDER --items 10M

writes ``vectors.npy`` (``[items, dim]`` fp16, row r is item r) and ``interactions.parquet`` (``user_id``, ``item_id``,
in order). Popularity follows Zipf's law with exponent 1, in the catalog and within each topic.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from h2rec._files import replacing

TOPICS = 1000
GROUPS = 32  # of a topic
_PIECE = 250_000  # items or users that are made at a time
_STAY = 0.8  # chance that a user's next item is of the same topic
_SHORTEST, _LONGEST = 5, 40  # sequences


def count(text: str) -> int:
    """``"10M"`` -> 10,000,000; also ``k``, or plain digits."""
    factor = {"k": 1_000, "M": 1_000_000}.get(text[-1:], 1)
    number = int(text if factor == 1 else text[:-1]) * factor
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return number


class Popularity:
    """Which item stands at which rank of popularity: an affine permutation, so that nothing is stored.

    The topic of rank r is ``r % topics``: each has popular and rare items.
    """

    def __init__(self, num_items: int) -> None:
        self.num_items = num_items
        self.topics = min(TOPICS, num_items)
        self._factor = next(
            factor
            for factor in range(int(0.618 * num_items) + 1, 2 * num_items + 2)
            if math.gcd(factor, num_items) == 1
        )
        self._inverse = pow(self._factor, -1, num_items)

    def item(self, ranks: np.ndarray) -> np.ndarray:
        return ranks * self._factor % self.num_items

    def rank(self, items: np.ndarray) -> np.ndarray:
        return items * self._inverse % self.num_items

    def draw(self, topics: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """An item of each topic: the logarithm of its place in it is uniform, which is Zipf's law."""
        sizes = (self.num_items - 1 - topics) // self.topics + 1
        places = (sizes + 1) ** rng.random(topics.shape)
        return self.item((places.astype(np.int64) - 1).clip(0, sizes - 1) * self.topics + topics)


def vector_pieces(popularity: Popularity, dim: int, seed: int) -> Iterator[np.ndarray]:
    """fp16 ``[piece, dim]``: the centre of a topic, that of a group in it, and noise."""
    rng = np.random.default_rng([seed, 0])
    topics = rng.standard_normal((popularity.topics, dim), dtype=np.float32)
    groups = 0.6 * rng.standard_normal((popularity.topics, GROUPS, dim), dtype=np.float32)
    for start in range(0, popularity.num_items, _PIECE):
        items = np.arange(start, min(start + _PIECE, popularity.num_items))
        place, topic = np.divmod(popularity.rank(items), popularity.topics)
        noise = 0.4 * rng.standard_normal((len(items), dim), dtype=np.float32)
        yield (topics[topic] + groups[topic, place % GROUPS] + noise).astype(np.float16)


def sequence_pieces(
    popularity: Popularity, num_users: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """User ids and item ids of so many users' interactions, in order."""
    rng = np.random.default_rng([seed, 1])
    for start in range(0, num_users, _PIECE):
        lengths = rng.integers(_SHORTEST, _LONGEST + 1, min(_PIECE, num_users - start))
        users = np.repeat(np.arange(start, start + len(lengths)), lengths)
        moves = rng.random(len(users)) >= _STAY
        moves[np.cumsum(lengths) - lengths] = True
        topics = rng.integers(0, popularity.topics, len(users))
        topics = topics[np.maximum.accumulate(np.where(moves, np.arange(len(users)), 0))]
        yield users, popularity.draw(topics, rng)


def write_vectors(path: Path, popularity: Popularity, dim: int, seed: int) -> None:
    header = {"descr": "<f2", "fortran_order": False, "shape": (popularity.num_items, dim)}
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for piece in vector_pieces(popularity, dim, seed):
            file.write(piece.tobytes())


def write_interactions(path: Path, popularity: Popularity, num_users: int, seed: int) -> None:
    pieces = [
        pl.DataFrame({"user_id": users, "item_id": items})
        for users, items in sequence_pieces(popularity, num_users, seed)
    ]
    with replacing(path) as temporary:
        pl.concat(pieces).write_parquet(temporary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--items", type=count, default=count("1M"), help="such as 10M")
    parser.add_argument("--users", type=count, default=None, help="default: a tenth of the items")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    popularity = Popularity(args.items)
    write_vectors(args.folder / "vectors.npy", popularity, args.dim, args.seed)
    users = args.users or max(1, args.items // 10)
    write_interactions(args.folder / "interactions.parquet", popularity, users, args.seed)


if __name__ == "__main__":
    main()
