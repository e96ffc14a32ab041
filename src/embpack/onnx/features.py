"""Nodes of ONNX's standard operators that take the bags of several features apart."""

from dataclasses import replace

from onnx import TensorProto

from embpack.onnx.bags import Bags, add_flat
from embpack.onnx.graph import TableGraph


class Features:
    """Bags of several features, feature after feature, as many of each.

    Args:
        graph: of no table.
        bags: of all features.
        num_features: how many.
    """

    def __init__(self, graph: TableGraph, bags: Bags, num_features: int) -> None:
        indices, offsets, weights = add_flat(graph, bags)
        if not bags.has_end:
            offsets = graph.add("Concat", offsets, graph.add("Shape", indices), axis=0, name="edges")
        self._graph = graph
        self._bags = replace(bags, indices=indices, offsets=offsets, weights=weights, include_last_offset=True)
        num_bags = graph.add("Sub", graph.add("Shape", offsets), graph.constant([1]), name="num_bags")
        self._batch = graph.add("Div", num_bags, graph.constant([num_features]), name="batch")

    def split(self, feature: int) -> Bags:
        """Add nodes that find the bags of a feature."""
        add, constant, axis = self._graph.add, self._graph.constant, self._graph.constant([0])
        first = add("Mul", self._batch, constant([feature]))
        end = add("Add", add("Add", first, self._batch), constant([1]))
        edges = add("Slice", str(self._bags.offsets), first, end, axis, name="edges_of_feature")
        start = add("Gather", edges, axis, axis=0)
        last = add("Slice", edges, constant([-1]), add("Shape", edges), axis)
        indices = add("Slice", self._bags.indices, start, last, axis, name="indices_of_feature")
        weights = self._bags.weights
        if weights is not None:
            weights = add("Slice", weights, start, last, axis)
        offsets = add("Cast", add("Sub", edges, start), to=TensorProto.INT64, name="offsets_of_feature")
        return replace(self._bags, indices=indices, offsets=offsets, weights=weights)
