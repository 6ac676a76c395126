"""The compiled inner loops of the join: one tile of members, all the queries that probe its cells.

Short loops in functions of their own: as parts of one long loop nest they took three times as long.
"""

# pyright: reportCallIssue=false
# `bit_count` and `lowest_bit` are intrinsics of numba: what it compiles takes one argument less than what Python sees.

import numpy as np
from numba import njit

from curation.ops.sketches import (
    ROUGH_MARGIN,
    SKETCH_WORDS,
    bit_count,
    exact_dot,
    lowest_bit,
    rough_dot,
)

BLOCK = 32
"""Members whose half sketches stay in registers while the queries pass by: 16 AVX-512 registers."""

CHUNK = 256  # queries whose sketches and vectors stay in the nearer caches while the members pass by


@njit(cache=True, nogil=True)
def grouped_by_cell(probes: np.ndarray, num_cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Query indices int32 sorted by probed cell, and where each cell's begin: int64 [K + 1]."""
    bounds = np.zeros(num_cells + 1, np.int64)
    for cell in probes.ravel():
        bounds[cell + 1] += 1
    bounds = np.cumsum(bounds)
    filled = bounds[:-1].copy()
    order = np.empty(probes.size, np.int32)
    for query in range(probes.shape[0]):
        for cell in probes[query]:
            order[filled[cell]] = query
            filled[cell] += 1
    return order, bounds


@njit(cache=True, nogil=True)
def pairs_by_sketch(
    words, vectors, bounds, query_vectors, query_sketches, order, starts, stops, radius, half, threshold,
    capacity,
):  # fmt: skip
    """Pairs of a tile: sketches within radius, then the exact similarity. Returns (query, member, similarity)."""
    out_query = np.empty(capacity, np.int32)
    out_member = np.empty(capacity, np.int64)
    out_similarity = np.empty(capacity, np.float32)
    count = 0
    rough_threshold = threshold - ROUGH_MARGIN
    limit, half_limit = np.int64(radius) + 1, np.int64(half) + 1
    buffer = np.empty((CHUNK, SKETCH_WORDS), np.uint64)
    asking = np.empty(CHUNK + 1, np.int64)
    masks = np.empty(CHUNK + 1, np.uint64)
    candidates = np.empty((CHUNK * BLOCK, 2), np.int64)
    rough = np.empty(CHUNK * BLOCK, np.float32)
    for cell in range(starts.size):
        for chunk in range(starts[cell], stops[cell], CHUNK):
            num_queries = min(CHUNK, stops[cell] - chunk)
            for j in range(num_queries):
                for word in range(SKETCH_WORDS):
                    buffer[j, word] = query_sketches[order[chunk + j], word]
            for base in range(bounds[cell], bounds[cell + 1], BLOCK):
                num_members = min(BLOCK, bounds[cell + 1] - base)
                w0, w1 = words[0, base : base + BLOCK], words[1, base : base + BLOCK]
                w2, w3 = words[2, base : base + BLOCK], words[3, base : base + BLOCK]
                w4, w5 = words[4, base : base + BLOCK], words[5, base : base + BLOCK]
                w6, w7 = words[6, base : base + BLOCK], words[7, base : base + BLOCK]
                num_near = near_masks(
                    buffer[:num_queries], w0, w1, w2, w3, w4, w5, w6, w7, half_limit, limit, asking, masks
                )
                real = (np.uint64(1) << np.uint64(num_members)) - np.uint64(1)
                num_candidates = listed(masks[:num_near], real, asking, order[chunk:], base, candidates)
                rough_dots(query_vectors, vectors, candidates[:num_candidates], rough)
                num_candidates = passed(rough[:num_candidates], rough_threshold, candidates)
                for i in range(num_candidates):
                    query, member = candidates[i, 0], candidates[i, 1]
                    similarity = exact_dot(query_vectors[query], vectors[member])
                    if similarity < threshold:
                        continue
                    if count == out_query.size:
                        out_query = np.append(out_query, np.empty_like(out_query))
                        out_member = np.append(out_member, np.empty_like(out_member))
                        out_similarity = np.append(out_similarity, np.empty_like(out_similarity))
                    out_query[count] = query
                    out_member[count] = member
                    out_similarity[count] = similarity
                    count += 1
    return out_query[:count].copy(), out_member[:count].copy(), out_similarity[:count].copy()


@njit(cache=True, nogil=True)
def listed(masks, real, asking, order, base, pairs):
    """Write the bits of the masks as (query, member) pairs; returns how many."""
    count = 0
    for hit in range(masks.size):
        near = masks[hit] & real
        while near:
            pairs[count, 0] = order[asking[hit]]
            pairs[count, 1] = base + np.int64(lowest_bit(near))
            near &= near - np.uint64(1)
            count += 1
    return count


@njit(cache=True, nogil=True)
def passed(rough, rough_threshold, pairs):
    """Move the pairs whose rough similarity reaches the threshold to the front; returns how many."""
    count = 0
    for i in range(rough.size):
        if rough[i] >= rough_threshold:
            pairs[count, 0] = pairs[i, 0]
            pairs[count, 1] = pairs[i, 1]
            count += 1
    return count


@njit(cache=True, nogil=True)
def rough_dots(query_vectors, vectors, pairs, out):
    for i in range(pairs.shape[0]):
        out[i] = rough_dot(query_vectors[pairs[i, 0]], vectors[pairs[i, 1]])


@njit(cache=True, nogil=True)
def near_masks(sketches, w0, w1, w2, w3, w4, w5, w6, w7, half_limit, limit, asking, masks):
    """Which of the queries' sketches [q, 8] are near which of 32 members, whose eight words are w0 to w7.

    Fills asking with query indices and masks with the members near each; returns how many. Two loops without branches:
    in the first, the first halves of the members' sketches stay in registers while the queries pass by. The distance
    minus the limit is negative for a pair worth a second look, so the sign of the bitwise or of a block's differences
    tells whether it has any.
    """
    num_asking = 0
    for j in range(sketches.shape[0]):
        q0, q1, q2, q3 = sketches[j, 0], sketches[j, 1], sketches[j, 2], sketches[j, 3]
        signs = np.int64(0)
        for i in range(BLOCK):
            first = bit_count(w0[i] ^ q0) + bit_count(w1[i] ^ q1) + bit_count(w2[i] ^ q2) + bit_count(w3[i] ^ q3)
            signs |= np.int64(first) - half_limit
        asking[num_asking] = j
        num_asking += signs < 0
    num_near = 0
    for hit in range(num_asking):
        j = asking[hit]
        q0, q1, q2, q3 = sketches[j, 0], sketches[j, 1], sketches[j, 2], sketches[j, 3]
        q4, q5, q6, q7 = sketches[j, 4], sketches[j, 5], sketches[j, 6], sketches[j, 7]
        near = np.uint64(0)
        for i in range(BLOCK):
            first = bit_count(w0[i] ^ q0) + bit_count(w1[i] ^ q1) + bit_count(w2[i] ^ q2) + bit_count(w3[i] ^ q3)
            second = bit_count(w4[i] ^ q4) + bit_count(w5[i] ^ q5) + bit_count(w6[i] ^ q6) + bit_count(w7[i] ^ q7)
            both = (np.int64(first) - half_limit) & (np.int64(first + second) - limit)
            near |= (np.uint64(both) >> np.uint64(63)) << np.uint64(i)
        asking[num_near] = j
        masks[num_near] = near
        num_near += near != 0
    return num_near


@njit(cache=True, nogil=True)
def pairs_by_score(scores, asking, first_member, query_vectors, vectors, threshold):
    """(query, member, exact similarity) where it reaches the threshold; scores are good to ROUGH_MARGIN."""
    query = np.empty(1024, np.int64)
    member = np.empty(1024, np.int64)
    similarity = np.empty(1024, np.float32)
    count = 0
    rough_threshold = threshold - ROUGH_MARGIN
    for j in range(asking.size):
        line = scores[j]
        for base in range(0, line.size, 64):
            piece = line[base : base + 64]
            hits = 0
            for i in range(piece.size):
                hits += piece[i] >= rough_threshold
            if hits == 0:
                continue
            for i in range(piece.size):
                if piece[i] >= rough_threshold:
                    m = first_member + base + i
                    exact = exact_dot(query_vectors[asking[j]], vectors[m])
                    if exact >= threshold:
                        if count == query.size:
                            query = np.append(query, np.empty_like(query))
                            member = np.append(member, np.empty_like(member))
                            similarity = np.append(similarity, np.empty_like(similarity))
                        query[count] = asking[j]
                        member[count] = m
                        similarity[count] = exact
                        count += 1
    return query[:count].copy(), member[:count].copy(), similarity[:count].copy()


@njit(cache=True, nogil=True)
def insert_nearest(scores, asking, first_member, query_vectors, vectors, tile_gids, similarities, gids):
    k = similarities.shape[1]
    for j in range(asking.size):
        query = asking[j]
        line, best, best_gid = scores[j], similarities[query], gids[query]
        for base in range(0, line.size, 64):
            piece = line[base : base + 64]
            rough_threshold = best[k - 1] - ROUGH_MARGIN
            hits = 0
            for i in range(piece.size):
                hits += piece[i] >= rough_threshold
            if hits == 0:
                continue
            for i in range(piece.size):
                if piece[i] < best[k - 1] - ROUGH_MARGIN:
                    continue
                member = first_member + base + i
                exact, gid = exact_dot(query_vectors[query], vectors[member]), tile_gids[member]
                at = k
                while at > 0 and (exact > best[at - 1] or (exact == best[at - 1] and gid < best_gid[at - 1])):
                    at -= 1
                if at == k:
                    continue
                for place in range(k - 1, at, -1):
                    best[place] = best[place - 1]
                    best_gid[place] = best_gid[place - 1]
                best[at] = exact
                best_gid[at] = gid
