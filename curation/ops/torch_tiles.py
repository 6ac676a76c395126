"""The join's tiles in torch, on a GPU: the pairs and neighbours that the processor's kernels find, to the last bit.

float16 rows meet in matrix products that are added up in float32. Those are good to ROUGH_MARGIN and only choose
candidates. What decides is the dot product in float64, which for stored vectors is *exact* in any order of addition
(`curation.ops.sketches`), so that a GPU and a processor round the same number once to float32.

Rows arrive as arrays, float16 or float32 with float16 values, and leave as arrays. Memory is a number of bytes on the
device; it changes the time, never the result. `device="cpu"` is the same code on a processor, for tests.
"""

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from curation.ops.randomness import INCREMENT
from curation.ops.sketches import HALF_WORDS, ROUGH_MARGIN, SKETCH_WORDS, half_radius, round_directions, round_rows

ENTRY_BYTES = 64
"""Of one entry of a product, if all are candidates: its score, its place, its exact similarity, copies of these."""

MAX_ENTRIES = 2**30
"""of a product; torch.nonzero counts them in 32 bits"""

_SIGN = -(2**63)  # turned over, unsigned numbers are in the order of signed ones
_SORT_BYTES = 192  # of one candidate for the k nearest, while they are sorted
_DENSE = 64  # where more than one entry in this many is a candidate, a whole product in float64 is cheaper


@functools.cache
def memory_bytes(device: str | torch.device) -> int:
    """What the products of one call may take: a quarter of a GPU's memory, which is one actor's; else 256 MB."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 4
    return 2**28


def on_device(x: np.ndarray, device: str | torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A copy of x on the device (on a processor, possibly x itself); float32 with float16 values narrows exactly."""
    writable = np.ascontiguousarray(x) if x.flags.writeable else np.array(x)  # torch warns of arrays that are not
    return torch.from_numpy(writable).to(device=device, dtype=dtype)


def half_products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x @ y.T of float16 [N, D] and [M, D], added up and returned in float32 [N, M].

    The error is below D * 2^-22 for unit rows, ROUGH_MARGIN at 4,096: tensor cores that cut where others round may lose
    half of that.
    """
    if x.device.type == "cuda":
        return torch.mm(x, y.T, out_dtype=torch.float32)
    return x.float() @ y.float().T  # a processor has no product of halves that stays in float32; the values are equal


def float_products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x @ y.T in float32, without TensorFloat32, whatever the process has set: exact for integers below 2^24."""
    with _ieee():
        return x @ y.T


class Rows:
    """N unit rows on the device as float16, with their sketches if those count: those that ask, or a tile of members.

    Args:
        vectors: [N, D], with float16 values; sketches: uint64 [N, 8], or None.
    """

    def __init__(self, vectors: np.ndarray, sketches: np.ndarray | None, device: str | torch.device) -> None:
        self.vectors = on_device(vectors, device, torch.float16)
        self.sketches = None if sketches is None else on_device(sketches.view(np.int64), device)
        self.signs: torch.Tensor | None = None

    def mirrored(self, signs: np.ndarray, sketches: np.ndarray | None) -> "Rows":
        """The rows of the mirrored images, with their sketches; the vectors are held once."""
        turned = copy.copy(self)
        turned.signs = on_device(signs, self.device, torch.float16)
        turned.sketches = None if sketches is None else on_device(sketches.view(np.int64), self.device)
        return turned

    @property
    def device(self) -> torch.device:
        return self.vectors.device

    def __len__(self) -> int:
        return len(self.vectors)

    def of(self, rows: torch.Tensor | slice) -> torch.Tensor:
        return self.vectors[rows] if self.signs is None else self.vectors[rows] * self.signs


def near_pairs(
    queries: Rows,
    asking: np.ndarray,
    members: Rows,
    start: int,
    stop: int,
    threshold: float,
    radius: int | None = None,
    *,
    most: int | None = None,
    passes: "HashesBelow | None" = None,
    max_bytes: int | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pairs of the queries `asking` (indices) and members start to stop whose exact similarity reaches the threshold.

    They come product by product, in the order of (query, member), at most max_bytes / ENTRY_BYTES at a time; a query's
    members ascend from one product to the next, too.

    Args:
        radius: only pairs whose sketches are so near, as in `pairs_by_sketch`; None: whatever their sketches.
        most: of a product's pairs, only so many of each query, those of the first members.
        passes: only pairs that pass, asked product by product: of positions in asking and in members.

    Returns:
        positions in asking and in members, int32 [P] each, and similarities float32 [P].
    """
    max_bytes = memory_bytes(queries.device) if max_bytes is None else max_bytes
    limit = np.float32(threshold).item()
    indices = on_device(asking, queries.device, torch.int64)
    for some, others in _blocks(len(indices), stop - start, max_bytes):
        rows, own = indices[some], slice(start + others.start, start + others.stop)
        x, y = queries.of(rows), members.of(own)
        query, member = torch.nonzero(half_products(x, y) >= limit - float(ROUGH_MARGIN), as_tuple=True)
        if passes is not None:
            near = passes(query + some.start, member + own.start)
            query, member = query[near], member[near]
        if radius is not None:
            assert queries.sketches is not None
            assert members.sketches is not None
            near = _sketches_are_near(queries.sketches[rows], members.sketches[own], query, member, radius, max_bytes)
            query, member = query[near], member[near]
        exact = _exact_similarities(x, y, query, member, max_bytes)
        near = exact >= limit
        query, member, exact = query[near], member[near], exact[near]
        if most is not None:
            kept = _places(query, len(x)) < most
            query, member, exact = query[kept], member[kept], exact[kept]
        yield (
            (query + some.start).int().cpu().numpy(),
            (member + own.start).int().cpu().numpy(),
            exact.cpu().numpy(),
        )


class HashesBelow:
    """Which pairs of Q queries and M members have a hash (`curation.ops.true_pairs.hashes`) up to the query's limit.

    Args:
        stream: of the seed; salts: uint64 [Q], the hashes of the queries' gids; gids: int64 [M].
    """

    def __init__(self, stream: np.uint64, salts: np.ndarray, gids: np.ndarray, device: str | torch.device) -> None:
        self._stream, self._increment = (int(word.view(np.int64)) for word in (stream, INCREMENT))
        self._salts, self._gids = on_device(salts.view(np.int64), device), on_device(gids, device, torch.int64)
        self._limits = self._salts

    def set_limits(self, limits: np.ndarray) -> None:
        """uint64 [Q]."""
        self._limits = on_device(limits.view(np.int64), self._salts.device) ^ _SIGN

    def __call__(self, query: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
        z = (self._salts[query] + self._gids[member] + 1) * self._increment ^ self._stream
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ _shifted(z, shift)) * (factor - 2**64)
        return (z ^ _shifted(z, 31)) ^ _SIGN <= self._limits[query]


class Nearest:
    """The k nearest members that each of Q queries has met, equal ones by smaller gid, held on the device."""

    def __init__(self, queries: Rows, k: int, max_bytes: int | None = None) -> None:
        shape = len(queries), k
        self._queries = queries
        self._gids = torch.full(shape, -1, dtype=torch.int64, device=queries.device)
        self._similarities = torch.full(shape, -torch.inf, dtype=torch.float32, device=queries.device)
        self._max_bytes = memory_bytes(queries.device) if max_bytes is None else max_bytes

    def meet(self, asking: np.ndarray, members: Rows, start: int, stop: int, gids: np.ndarray) -> None:
        """The queries `asking` (indices, each once) meet members start to stop, of these gids, all new to them."""
        indices, names = (on_device(x, self._queries.device, torch.int64) for x in (asking, gids))
        width, k = stop - start, self._gids.shape[1]  # what a query holds is sorted with what it meets
        share = ENTRY_BYTES * width / (_SORT_BYTES * max(width + k, 1))
        for some, others in _blocks(len(indices), width, int(self._max_bytes * share)):
            own = slice(start + others.start, start + others.stop)
            self._insert(indices[some], members.of(own), names[others])

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """gids int64 [Q, k] and similarities float32 [Q, k], nearest first; -1 and -inf where fewer were met."""
        return self._gids.cpu().numpy(), self._similarities.cpu().numpy()

    def _insert(self, queries: torch.Tensor, members: torch.Tensor, names: torch.Tensor) -> None:
        rows, margin = self._queries.of(queries), float(ROUGH_MARGIN)
        k = self._gids.shape[1]
        scores = half_products(rows, members)
        floor = self._similarities[queries, -1] - margin
        if len(members) > k:
            # k members score at least this, so the k-th exact similarity is less by a margin at most, and what reaches
            # that scores less by another.
            floor = torch.maximum(floor, scores.topk(k, dim=1).values[:, -1] - 2 * margin)
        query, member = torch.nonzero(scores >= floor[:, None], as_tuple=True)
        if not len(query):
            return
        exact = _exact_similarities(rows, members, query, member, self._max_bytes)
        held = torch.arange(len(queries), device=query.device).repeat_interleave(k)
        query = torch.cat([held, query])
        gids = torch.cat([self._gids[queries].flatten(), names[member]])
        exact = torch.cat([self._similarities[queries].flatten(), exact])
        order = gids.argsort()
        order = order[exact[order].argsort(descending=True, stable=True)]
        order = order[query[order].argsort(stable=True)]
        query, gids, exact = query[order], gids[order], exact[order]
        place = _places(query, len(queries))
        kept = place < k
        at = queries[query[kept]], place[kept]
        self._gids[at], self._similarities[at] = gids[kept], exact[kept]


def nearest_cells(
    vectors: np.ndarray, centroids: np.ndarray, nprobe: int, device: str, max_bytes: int | None = None
) -> np.ndarray:
    """`curation.ops.cells.nearest_cells`: int32 [n, nprobe], ascending. Scores are integers, the same everywhere."""
    max_bytes = memory_bytes(device) if max_bytes is None else max_bytes
    directions = on_device(round_directions(centroids), device)
    num_cells = len(directions)
    later_first = torch.arange(num_cells - 1, -1, -1, device=device)
    probes = np.empty((len(vectors), nprobe), np.int32)
    for some, _ in _blocks(len(vectors), num_cells, max_bytes, whole=True):
        scores = float_products(on_device(round_rows(vectors[some]), device), directions)
        keys = scores.long() * num_cells + later_first  # no two are equal, so there is one answer
        probes[some] = keys.topk(nprobe, dim=1, sorted=False).indices.sort(dim=1).values.cpu().numpy()
    return probes


def _exact_similarities(
    queries: torch.Tensor, members: torch.Tensor, query: torch.Tensor, member: torch.Tensor, max_bytes: int
) -> torch.Tensor:
    """The dot products of named pairs of float16 unit rows, rounded once to float32: those of `exact_dot`."""
    if len(query) * _DENSE > len(queries) * len(members) and len(queries) * len(members) * 8 <= max_bytes:
        return (queries.double() @ members.double().T)[query, member].float()
    out = torch.empty(len(query), dtype=torch.float32, device=queries.device)
    step = max(max_bytes // (ENTRY_BYTES * queries.shape[1]), 1)
    for start in range(0, len(query), step):
        pairs = slice(start, start + step)
        out[pairs] = (queries[query[pairs]].double() * members[member[pairs]].double()).sum(dim=1).float()
    return out


def _sketches_are_near(
    queries: torch.Tensor, members: torch.Tensor, query: torch.Tensor, member: torch.Tensor, radius: int, max_bytes: int
) -> torch.Tensor:
    """bool [P]: whether the sketches of named pairs, and their first halves, differ in few enough bits."""
    near = torch.empty(len(query), dtype=torch.bool, device=query.device)
    step = max(max_bytes // (ENTRY_BYTES * SKETCH_WORDS), 1)
    for start in range(0, len(query), step):
        pairs = slice(start, start + step)
        bits = _bit_counts(queries[query[pairs]] ^ members[member[pairs]])
        in_half = bits[:, :HALF_WORDS].sum(dim=1) <= int(half_radius(radius))
        near[pairs] = in_half & (bits.sum(dim=1) <= radius)
    return near


def _places(query: torch.Tensor, num_queries: int) -> torch.Tensor:
    """int64 [P]: how many of the same query come before, for queries in ascending order."""
    counts = torch.bincount(query, minlength=num_queries)
    return torch.arange(len(query), device=query.device) - (counts.cumsum(0) - counts)[query]


def _bit_counts(x: torch.Tensor) -> torch.Tensor:
    """Set bits of each int64: added up in pairs, then in fours, then in bytes, and those by a product that wraps."""
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (x * 0x0101010101010101) >> 56


def _blocks(num_rows: int, num_columns: int, max_bytes: int, whole: bool = False) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of products of at most max_bytes / ENTRY_BYTES entries, nearly square; or of all columns."""
    if not num_rows or not num_columns:
        return
    entries = max(min(max_bytes // ENTRY_BYTES, MAX_ENTRIES), 1)
    width = num_columns if whole else min(num_columns, max(int(entries**0.5), entries // num_rows))
    height = max(entries // width, 1)
    for top in range(0, num_rows, height):
        for left in range(0, num_columns, width):
            yield slice(top, min(top + height, num_rows)), slice(left, min(left + width, num_columns))


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x >> bits of the 64 bits of an int64, zeros coming in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@contextmanager
def _ieee() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
