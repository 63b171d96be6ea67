"""Text groups: notes that are the same text, or nearly so.

Near duplicates: two notes are alike when their sets of three-word shingles have a Jaccard similarity of at least the
threshold (Broder, "On the resemblance and containment of documents", 1997). MinHash with banding proposes the pairs,
the shingles themselves decide, and a group is whatever such pairs connect.
"""

import re
import zlib
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Sequence

import numpy as np
from datasets.utils import tqdm

from medlit.errors import SLOW, report_if_slow
from medlit.evaluation.results import IntArray

SHINGLE = 3  # words
_PERMUTATIONS = 128
_RECALL = 0.995  # a pair right at the threshold is proposed at least this often
_WORD = re.compile(r"\w+")


def exact_groups(text_hashes: Sequence[str]) -> IntArray:
    """Group number of each row, (N,): equal for equal hashes, numbered in the order of the hashes."""
    return np.unique(np.asarray(text_hashes, dtype=np.bytes_), return_inverse=True)[1].astype(np.int64)


def near_groups(texts: Sequence[str], exact: IntArray, threshold: float) -> IntArray:
    """Join exact groups, (N,), of which texts have at least this Jaccard similarity, over 0 and at most 1.

    One of the N texts of each exact group is read, so they may lie on disk. Returns each note's group, (N,): the
    smallest exact group number in it, whatever the order of the rows.
    """
    from datasketch import MinHash, MinHashLSH
    from scipy.cluster.hierarchy import DisjointSet

    _, first = np.unique(exact, return_index=True)
    joined = DisjointSet(range(len(first)))
    index = MinHashLSH(num_perm=_PERMUTATIONS, params=bands(threshold))
    # The scheme is named: another one proposes other pairs, and a split must not change with a release of datasketch.
    empty = MinHash(num_perm=_PERMUTATIONS, hashfunc=int, scheme="affine32")
    with report_if_slow(f"searching {len(first):,} texts for near duplicates", has_bar=True):
        for group, row in enumerate(tqdm(first, "Searching near duplicates", unit=" texts", delay=SLOW)):
            mine = shingles(texts[int(row)])
            if not mine:
                continue
            sketch = empty.copy()
            sketch.update_batch(mine)
            for other in index.query(sketch):
                if joined.connected(group, other):
                    continue
                theirs = shingles(texts[int(first[other])])
                if len(mine & theirs) / len(mine | theirs) >= threshold:
                    joined.merge(group, other)
            index.insert(group, sketch, check_duplication=False)
    smallest = np.empty(len(first), dtype=np.int64)
    for groups in joined.subsets():
        smallest[list(groups)] = min(groups)
    return smallest[exact]


def accuracy_ceiling(groups: Iterable[Hashable], specialties: Sequence[Collection[str]]) -> float:
    """Share of labelled notes that have the most frequent label of their group, among their own labels."""
    votes = Counter((group, name) for group, own in zip(groups, specialties, strict=True) for name in own)
    most = {group: notes for (group, _), notes in reversed(votes.most_common())}  # the last, and most, is kept
    return sum(most.values()) / sum(map(bool, specialties)) if most else 1.0


def bands(threshold: float) -> tuple[int, int]:
    """Number of bands, and rows of each: the fewest false pairs that `_RECALL` allows."""
    for rows in range(_PERMUTATIONS // 2, 1, -1):
        number = _PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** number >= _RECALL:
            return number, rows
    return _PERMUTATIONS, 1


def shingles(text: str) -> set[int]:
    """Hashes of a note's runs of three words, case and punctuation aside; a shorter note is one run."""
    words = _WORD.findall(text.lower())
    runs = range(max(1, len(words) - SHINGLE + 1)) if words else range(0)
    return {zlib.crc32(" ".join(words[start : start + SHINGLE]).encode()) for start in runs}
