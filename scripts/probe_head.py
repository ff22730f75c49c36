"""Cut the output head out of a bundle's selections, and measure what one head for all would save.

    python scripts/probe_head.py BUNDLE [--runtime openvino] [--tokens 1024] [--runs 7]

A selection by TRIO applies the output head to the hidden states of its probes and goes back
through it for the gradient, so each selection's graph has the head. Here each of them is cut in
three by its nodes: what comes before the head, the head with the loss's gradient between its two
products, and what comes after. The head's part, which is the same for all selections, is loaded
once. Printed are

* whether the three parts give the outputs of the whole, to the bit;
* seconds of all selections, whole and in parts, by turns: median (least to most);
* memory that the sessions take in a process of their own, after a run: anonymous, and mapped files;
* the bytes that pass from part to part for one row.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

sys.path.insert(0, str(Path(__file__).parents[1]))

from trio_deploy import Bundle, RuntimeOptions
from trio_deploy.bench.environment import load_average, machine, machine_text
from trio_deploy.families.names import EMBEDDINGS, HEAD
from trio_deploy.runtimes.base import Engine
from trio_deploy.runtimes.registry import open_runtime

_PARTS = ("before", "head", "after")
#: Nodes that pass a weight on in another form.
_FORMS = ("DequantizeLinear", "Reshape", "Transpose", "Cast", "Slice", "Identity")
_KEPT = 0.111
_TEXT = 64


@dataclass(frozen=True)
class Graph:
    """A graph with what its nodes read and which of its values are constants."""

    model: onnx.ModelProto
    reads: list[set[str]]
    constants: set[str]

    @classmethod
    def of(cls, model: onnx.ModelProto) -> Graph:
        reads = [_read(node) for node in model.graph.node]
        constants = {tensor.name for tensor in model.graph.initializer}
        for node, names in zip(model.graph.node, reads, strict=True):
            if names <= constants:
                constants.update(node.output)
        return cls(model, reads, constants)

    def part(self, index: Sequence[int], outputs: Sequence[str]) -> onnx.ModelProto:
        """Some of the nodes as a model, with the nodes that make the constants they read."""
        nodes, needed = self.model.graph.node, {name for i in index for name in self.reads[i]}
        chosen = set(index)
        for i in reversed(range(len(nodes))):
            if needed & set(nodes[i].output) <= self.constants and needed & set(nodes[i].output):
                chosen.add(i)
                needed |= self.reads[i]
        made = {name for i in chosen for name in nodes[i].output}
        weights = [tensor for tensor in self.model.graph.initializer if tensor.name in needed]
        known = made | {tensor.name for tensor in weights} | {""}
        graph = onnx.helper.make_graph(
            [nodes[i] for i in sorted(chosen)],
            self.model.graph.name,
            [self._info(name) for name in sorted(needed - known)],
            [self._info(name) for name in outputs],
            weights,
        )
        return onnx.helper.make_model(
            graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version
        )

    def _info(self, name: str) -> onnx.ValueInfoProto:
        graph = self.model.graph
        return next(v for v in (*graph.input, *graph.output, *graph.value_info) if v.name == name)


def _read(node: onnx.NodeProto) -> set[str]:
    """Names of values that a node reads, its subgraphs' from outside of them included."""
    names = set(node.input) - {""}
    for attribute in node.attribute:
        if attribute.HasField("g"):
            inner = {name for each in attribute.g.node for name in _read(each)}
            made = {name for each in attribute.g.node for name in each.output}
            made |= {value.name for value in attribute.g.input}
            made |= {tensor.name for tensor in attribute.g.initializer}
            names |= (inner | {value.name for value in attribute.g.output}) - made
    return names


def cut(model: onnx.ModelProto) -> dict[str, onnx.ModelProto]:
    """Cut a selection's graph into what comes before the head, the head, and what comes after.

    Raises:
        ValueError: it does not have the head's two products.
    """
    graph, nodes = Graph.of(model), model.graph.node
    forms = {t.name for t in model.graph.initializer if t.name.startswith((HEAD, EMBEDDINGS))}
    head, products = set(), []
    for i, node in enumerate(nodes):
        if not graph.reads[i] & forms:
            continue
        if node.op_type in _FORMS and node.input[0] in forms:
            forms.update(node.output)
            head.add(i)
        elif not set(node.output) <= graph.constants:
            products.append(i)
    if len(products) != 2:
        raise ValueError(f"{model.graph.name} has {len(products)} products with the head, not 2")
    behind = _behind(graph, set(nodes[products[0]].output))
    read = {name for i in (products[1], *head) for name in graph.reads[i]}
    ahead = _ahead(graph, read - forms)
    head |= {*products, *(behind & ahead)}
    made = {name for i in head for name in nodes[i].output} - forms
    after = _behind(graph, made) - head
    constant = {i for i, node in enumerate(nodes) if set(node.output) <= graph.constants}
    groups = {
        "before": sorted(set(range(len(nodes))) - head - after - constant),
        "head": sorted(head - constant),
        "after": sorted(after - constant),
    }
    results = {value.name for value in model.graph.output}
    parts, crossing = {}, []
    for name, index in groups.items():
        others = (i for other, each in groups.items() if other != name for i in each)
        wanted = results | {each for i in others for each in graph.reads[i]}
        own = [each for i in index for each in nodes[i].output]
        outputs = [e for e in own if e in wanted - graph.constants]
        parts[name] = graph.part(index, outputs)
        crossing += outputs if name == "head" else []
    given = {value.name for value in parts["head"].graph.input}
    read = [name for i in groups["head"] for name in nodes[i].input if name in given]
    # By the order of the head's nodes, which is the same in all selections, as names are not.
    names = {name: f"to_head.{k}" for k, name in enumerate(dict.fromkeys(read))}
    names |= {name: f"of_head.{k}" for k, name in enumerate(crossing)}
    for part in parts.values():
        _rename(part.graph, names)
    return parts


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename(attribute.g, names)


def _behind(graph: Graph, names: set[str]) -> set[int]:
    found, names = set(), set(names)
    for i, node in enumerate(graph.model.graph.node):
        if graph.reads[i] & names:
            found.add(i)
            names.update(node.output)
    return found


def _ahead(graph: Graph, names: set[str]) -> set[int]:
    found, names = set(), set(names)
    for i, node in reversed(list(enumerate(graph.model.graph.node))):
        if set(node.output) & names:
            found.add(i)
            names |= graph.reads[i]
    return found


def write_parts(bundle: Bundle, folder: Path) -> dict[str, dict[str, Path]]:
    """Write whole graph and parts of each selection beside links to the weights they name."""
    written: dict[str, dict[str, Path]] = {}
    for stage in bundle.of_kind("select"):
        model = onnx.load(bundle.graph(stage.name), load_external_data=False)
        models = {"whole": model, **cut(model)}
        for name, each in models.items():
            path = folder / f"{stage.name}.{name}.onnx"
            onnx.save(each, path)
            written.setdefault(stage.name, {})[name] = path
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                link = folder / entry.value
                if entry.key == "location" and not link.exists():
                    link.parent.mkdir(exist_ok=True)
                    os.link(bundle.path / entry.value, link)
    return written


def feeds_of(bundle: Bundle, tokens: int) -> dict[str, np.ndarray]:
    """Inputs of a selection: one row of visual tokens and 64 of text, with random states."""
    text = bundle.config.text
    count = tokens + _TEXT
    states = np.random.default_rng(0).standard_normal((1, count, text.hidden_size))
    positions = np.arange(count)[None]
    return {
        "hidden_states": states.astype(bundle.manifest.dtype),
        "position_ids": positions if text.rope.axes is None else np.tile(positions, (1, 3, 1)),
        "lengths": np.array([count]),
        "visual_mask": positions < tokens,
        "keep": np.array([int(_KEPT * tokens)]),
        "width": np.array([int(_KEPT * tokens) + _TEXT]),
    }


Values = dict[str, np.ndarray]


class Selections:
    """All selections of a bundle, whole or in parts with one head."""

    def __init__(
        self, paths: Mapping[str, Mapping[str, Path]], runtime: str, names: Sequence[str]
    ) -> None:
        opened = open_runtime(RuntimeOptions(runtime, threads=1))
        self.engines: dict[str, list[Engine]] = {}
        heads: list[Engine] = []
        for stage, parts in paths.items():
            for name in names:
                if name == "head" and heads:
                    engine = heads[0]
                else:
                    engine = opened.open(parts[name], keep_precision=True, shares_weights=True)
                heads += [engine] if name == "head" else []
                self.engines.setdefault(stage, []).append(engine)

    def run(self, feeds: Mapping[str, Values]) -> Iterator[tuple[str, Values]]:
        """Run each selection; yields its name and all values.

        OpenVINO makes one output of two that are equal; the other's value is that of the feeds.
        """
        for stage, engines in self.engines.items():
            values = dict(feeds[stage])
            for engine in engines:
                values |= engine.run({name: values[name] for name in engine.inputs})
            yield stage, values


def resident() -> dict[str, int]:
    """MiB of this process: anonymous memory, and files that it has mapped."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return {"anonymous": kib["Anonymous"] >> 10, "mapped": (kib["Rss"] - kib["Anonymous"]) >> 10}


def _child(folder: Path, runtime: str, names: Sequence[str]) -> None:
    paths: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.glob("*.onnx")):
        stage, name, _ = path.name.split(".")
        paths.setdefault(stage, {})[name] = path
    feeds = {stage: dict(np.load(folder / f"{stage}.npz")) for stage in paths}
    before = resident()
    selections = Selections(paths, runtime, names)
    for _ in selections.run(feeds):
        pass
    after = resident()
    print(json.dumps({name: after[name] - before[name] for name in after}))


def main() -> None:
    """Cut, compare, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--runtime", default="onnxruntime", choices=("onnxruntime", "openvino"))
    parser.add_argument("--tokens", type=int, default=1024, help="visual tokens of the one row")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--child", metavar="NAMES", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        _child(args.bundle, args.runtime, args.child.split(","))
        return
    bundle = Bundle.load(args.bundle)
    with tempfile.TemporaryDirectory(dir=bundle.path.parent) as temporary:
        folder, load = Path(temporary), load_average()
        paths = write_parts(bundle, folder)
        given = feeds_of(bundle, args.tokens)
        parts = Selections(paths, "onnxruntime", _PARTS)
        feeds = dict(parts.run(dict.fromkeys(paths, given)))
        for line in (*_passed(parts, feeds), *_compared(paths, args, feeds)):
            print(line, flush=True)
        for stage, values in feeds.items():
            np.savez(folder / f"{stage}.npz", **values)  # type: ignore[arg-type]
        for title, names in (("whole", ("whole",)), ("parts", _PARTS)):
            command = [sys.executable, __file__, str(folder), "--runtime", args.runtime]
            command += ["--child", ",".join(names)]
            took = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            print(f"memory, {title}: {took['anonymous']} MiB, and {took['mapped']} MiB mapped")
    print(machine_text(machine(1), load, load_average()))


def _passed(parts: Selections, feeds: Mapping[str, Values]) -> Iterator[str]:
    """Bytes that pass from part to part of the first selection."""
    stage, engines = next(iter(parts.engines.items()))
    made: dict[str, int] = {}
    for source, sink in ((0, 1), (0, 2), (1, 2)):
        names = set(engines[source].outputs) & set(engines[sink].inputs)
        made[f"{_PARTS[source]} to {_PARTS[sink]}"] = sum(feeds[stage][n].nbytes for n in names)
    yield "passed on: " + ", ".join(f"{way} {n / 2**20:.2f} MiB" for way, n in made.items())


def _compared(
    paths: Mapping[str, Mapping[str, Path]], args: argparse.Namespace, feeds: Mapping[str, Values]
) -> Iterator[str]:
    """Whether outputs are equal, and seconds by turns."""
    ways = {
        "whole": Selections(paths, args.runtime, ("whole",)),
        "parts": Selections(paths, args.runtime, _PARTS),
    }
    whole, parts = (dict(way.run(feeds)) for way in ways.values())
    outputs = next(iter(ways["whole"].engines.values()))[0].outputs
    for names, what in ((outputs, "all outputs"), (("keep_index",), "the kept tokens")):
        same = all(
            np.array_equal(values[name], parts[stage][name])
            for stage, values in whole.items()
            for name in names
        )
        yield f"{what} of the parts are those of the whole to the bit: {'yes' if same else 'no'}"
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(args.runs):
        for way in sorted(ways, reverse=bool(turn % 2)):
            start = time.perf_counter()
            for _ in ways[way].run(feeds):
                pass
            seconds[way].append(time.perf_counter() - start)
    for way, each in seconds.items():
        yield f"seconds, {way}: {statistics.median(each):.3f} ({min(each):.3f} to {max(each):.3f})"
    ratio = statistics.median(b / a for a, b in zip(*seconds.values(), strict=True))
    yield f"parts take {ratio:.2f} of the whole's time"


if __name__ == "__main__":
    main()
