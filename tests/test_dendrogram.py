"""Average linkage, held against scipy's, and the order of models that it gives."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.cluster.hierarchy import cophenet, linkage
from scipy.spatial.distance import squareform

from blockmerge.comparing import SimilarityMatrix
from blockmerge.comparing.dendrogram import average_linkage, dendrogram_of


def some_distances(count, seed):
    distances = np.random.default_rng(seed).random((count, count))
    distances = distances + distances.T
    np.fill_diagonal(distances, 0.0)
    return distances


def members_of(tree):
    """The places in the matrix of every join, and what scipy calls the cophenetic distances."""
    groups = [frozenset([place]) for place in tree.order]
    heights = np.zeros((len(groups), len(groups)))
    for join in tree.joins:
        one, other = (groups[number] for number in join.groups)
        for a in one:
            for b in other:
                heights[a, b] = heights[b, a] = join.height
        groups.append(one | other)
    return groups[len(tree.order) :], heights


@pytest.mark.parametrize("count", [2, 3, 20, 61])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_scipys_average_linkage(count, seed):
    distances = some_distances(count, seed)
    tree = average_linkage(distances)
    expected = linkage(squareform(distances), "average")
    assert [join.height for join in tree.joins] == pytest.approx(expected[:, 2])
    _, heights = members_of(tree)
    np.testing.assert_allclose(squareform(heights), cophenet(expected))


@pytest.mark.parametrize("count", [2, 3, 20, 61])
def test_every_group_stands_together_in_the_order(count):
    tree = average_linkage(some_distances(count, seed=7))
    assert sorted(tree.order) == list(range(count))
    place = {model: number for number, model in enumerate(tree.order)}
    for group in members_of(tree)[0]:
        places = sorted(place[model] for model in group)
        assert places == list(range(places[0], places[-1] + 1))


def test_models_on_a_line_keep_its_order():
    """Whatever order they come in: neighbours on the line are neighbours in the tree."""
    where = np.random.default_rng(0).permutation(30)
    tree = average_linkage(np.abs(where[:, None] - where[None, :]) ** 1.5)
    along = where[list(tree.order)]
    assert list(along) in (list(range(30)), list(range(29, -1, -1)))


def test_families_of_a_matrix_stand_together():
    rows = [[100.0 if a == b else 99.0 - a if a % 3 == b % 3 else 60.0 for b in range(9)] for a in range(9)]
    alike = tuple(tuple((rows[a][b] + rows[b][a]) / 2 for b in range(9)) for a in range(9))
    tree = dendrogram_of(SimilarityMatrix("attention", 1, tuple("abcdefghi"), alike, {}))
    assert [
        sorted(place % 3 for place in tree.order[n : n + 3]) in ([0] * 3, [1] * 3, [2] * 3) for n in (0, 3, 6)
    ] == [True] * 3
    assert tree.joins[-1].height == pytest.approx(40.0)


def test_models_that_could_not_be_compared_are_not_in_the_tree():
    nothing = (None, None, None, None)
    matrix = SimilarityMatrix(
        "weights", None, ("a", "b", "c", "d"), ((1.0, None, 0.5, 0.9), nothing, (0.5, None, 1.0, None), (0.9, None, None, 1.0)),
        {"b": "b is a LoRA"},
    )  # fmt: skip
    tree = dendrogram_of(matrix)
    assert set(tree.order) == {0, 2, 3}
    assert abs(tree.order.index(0) - tree.order.index(3)) == 1
    assert [join.height for join in tree.joins] == pytest.approx([0.1, 0.5])


@pytest.mark.parametrize(("names", "order"), [((), ()), (("a",), (0,))])
def test_fewer_than_two(names, order):
    matrix = SimilarityMatrix("weights", None, names, ((1.0,),) * len(names), {})
    assert dendrogram_of(matrix).order == order
