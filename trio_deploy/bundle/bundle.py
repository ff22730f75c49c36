"""The exported folder, and the checks on loading it.

A bundle is one self-contained folder without pickles: `manifest.json`, the graphs (`*.onnx`) at the
top, `weights/*.safetensors` that they refer to, `tokenizer.json`, `tokens.json`,
`preprocessor.json`, `chat_template.jinja`. Loading it needs neither `onnx` nor a runtime.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from trio_deploy.bundle import schema_1
from trio_deploy.bundle.manifest import (
    MANIFEST,
    WEIGHTS,
    FileInfo,
    Kind,
    Manifest,
    StageInfo,
    TensorPlace,
    schema_of,
)
from trio_deploy.checkpoint.processor_files import CHAT_TEMPLATE, PREPROCESSOR, TOKENIZER, TOKENS
from trio_deploy.errors import TrioError
from trio_deploy.families.base import ModelConfig
from trio_deploy.families.preprocessing import Preprocessor
from trio_deploy.families.registry import parse_config
from trio_deploy.files import read_json, read_text, safe_path, sha256_of, write_atomically
from trio_deploy.schedule.budget import schedule_at_budget
from trio_deploy.schedule.schedule import Schedule


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle: its folder, manifest, graphs and small files."""

    path: Path
    manifest: Manifest

    @classmethod
    def load(cls, path: str | os.PathLike[str], verify: bool = False) -> Bundle:
        """Read the manifest and check the folder against it.

        Args:
            verify: also compare checksums, which reads every byte; weights without a recorded
                checksum (linked ones) are compared by size alone, see `record_checksums`.

        Raises:
            TrioError: no bundle there, a newer schema, a path that leaves the folder, or a file
                that is missing, of another size or (with `verify`) of other content; named.
        """
        root = Path(path)
        file = root / MANIFEST
        try:
            raw = read_json(file, "export the bundle again")
        except FileNotFoundError:
            if file.is_symlink():
                raise TrioError(
                    f"{file} is a symbolic link that leads to no file: put the file itself there"
                ) from None
            raise TrioError(
                f"{root} is not a bundle, since it has no {MANIFEST}: make one with trio-export"
            ) from None
        try:
            if schema_of(raw) == 1:
                manifest = schema_1.upgrade(raw, root)
            else:
                manifest = Manifest.from_json(raw)
        except TrioError as error:
            raise TrioError(f"cannot use {file}: {error}") from error
        bundle = cls(root, manifest)
        bundle.check(verify=verify)
        return bundle

    def check(self, verify: bool = False) -> None:
        """Compare the folder with the manifest; raises as `load` does."""
        paths = {name: safe_path(self.path, name) for name in self.manifest.files}
        planned = self.manifest.weights == "planned"
        for name, info in self.manifest.files.items():
            if planned and _is_weight(name):
                continue
            file = paths[name]
            if not file.is_file():
                raise TrioError(
                    f"the bundle {self.path} lacks {name}: copy the whole folder again, or export "
                    "the bundle again"
                )
            size = file.stat().st_size
            if size != info.size:
                raise TrioError(
                    f"{name} in the bundle {self.path} has {size} bytes where the manifest says "
                    f"{info.size}: copy it again, or export the bundle again"
                )
            if verify and info.sha256 is not None and sha256_of(file) != info.sha256:
                raise TrioError(
                    f"{name} in the bundle {self.path} is damaged (its SHA-256 is not the "
                    "manifest's): copy it again, or export the bundle again"
                )

    def check_places(self) -> None:
        """Compare the places of weights in the manifest with those in the graphs.

        Raises:
            TrioError: a graph would read a weight elsewhere; names it.
        """
        for name, stage in self.stages.items():
            read = schema_1.external_tensors(self.graph(name))
            for tensor in sorted(read.keys() ^ set(stage.constants)):
                raise TrioError(
                    f"the manifest of {self.path} and the graph of {name} disagree on whether it "
                    f"reads {tensor}: export the bundle again"
                )
            for tensor, place in read.items():
                if self.manifest.tensors[tensor] != place:
                    raise TrioError(
                        f"the manifest of {self.path} and the graph of {name} disagree on where "
                        f"{tensor} is stored: export the bundle again"
                    )

    def record_checksums(self) -> Bundle:
        """Record checksums of weights that have none yet (linked ones), so `verify` covers them.

        Returns:
            The bundle with the new manifest, which has also been written.

        Raises:
            TrioError: the manifest cannot be written.
        """
        files = dict(self.manifest.files)
        for name, info in files.items():
            if info.sha256 is None and self.manifest.weights != "planned":
                files[name] = FileInfo(info.size, sha256_of(safe_path(self.path, name)))
        manifest = msgspec.structs.replace(self.manifest, files=files)
        write_atomically(self.path / MANIFEST, manifest.dump())
        return replace(self, manifest=manifest)

    @property
    def files_without_checksum(self) -> list[str]:
        """Files without a recorded checksum."""
        return [name for name, info in self.manifest.files.items() if info.sha256 is None]

    @cached_property
    def config(self) -> ModelConfig:
        """The model's dimensions: the checkpoint's own config.json, and its head as recorded.

        Where pictures keep their sizes, with the bounds that the preprocessing settings give them.
        """
        config, made_from = parse_config(self.manifest.model.config), self.manifest.checkpoint
        if config.pixels is not None and PREPROCESSOR in self.manifest.files:
            config = Preprocessor.from_json(self.preprocessor, config).config
        return config if made_from is None else config.with_tied_head(made_from.tied)

    @cached_property
    def schedule(self) -> Schedule:
        """The pruning points of the graphs, with their default budget."""
        return Schedule.from_json(self.manifest.schedule)

    @cached_property
    def budgets(self) -> dict[float, Schedule]:
        """The recipe's schedules that these graphs can run, by budget."""
        return {
            float(budget): self.schedule.with_keeps(keeps)
            for budget, keeps in self.manifest.budgets.items()
        }

    def schedule_at(self, budget: float) -> Schedule:
        """What a budget means for this bundle: the recipe's schedule, else a solved one.

        Raises:
            TrioError: the graphs cannot reach it.
        """
        if not self.schedule.layers:
            if budget == 1.0:
                return self.schedule
            raise TrioError(
                "this bundle was exported without pruning points, so it has no other budget than "
                "1.0: export it with --budget"
            )
        return schedule_at_budget(budget, self.config.text.num_layers, self.schedule, self.budgets)

    @cached_property
    def stages(self) -> dict[str, StageInfo]:
        """Stages by name, in the order in which they run (`decode` comes last if there is one)."""
        return {stage.name: stage for stage in self.manifest.stages}

    def of_kind(self, kind: Kind) -> list[StageInfo]:
        """The stages of one kind, in order."""
        return [stage for stage in self.manifest.stages if stage.kind == kind]

    def only(self, kind: Kind) -> StageInfo:
        """The stage of a kind that a bundle has once.

        Raises:
            TrioError: it has none, or several.
        """
        found = self.of_kind(kind)
        if len(found) != 1:
            raise TrioError(
                f"the bundle {self.path} has {len(found)} stages of kind {kind}, not one: export "
                "it again"
            )
        return found[0]

    def graph(self, stage: str) -> Path:
        """The .onnx file of a stage.

        Raises:
            TrioError: this bundle has no such stage.
        """
        if stage not in self.stages:
            raise TrioError(
                f"the bundle {self.path} has no stage {stage!r}; it has {', '.join(self.stages)}"
            )
        return safe_path(self.path, self.stages[stage].file)

    def places(self, stage: str) -> Mapping[str, TensorPlace]:
        """Where the weights of a stage's graph are stored, by name."""
        return {name: self.manifest.tensors[name] for name in self.stages[stage].tensors}

    def constant_places(self, stage: str) -> Mapping[str, TensorPlace]:
        """The same of those that are constants of the graph, by name."""
        return {name: self.manifest.tensors[name] for name in self.stages[stage].constants}

    def with_end_tokens(self, token_ids: Sequence[int]) -> Bundle:
        """The same bundle with other tokens that end an answer; none: only its length does."""
        manifest = self.manifest
        generation = msgspec.structs.replace(manifest.generation, eos_token_ids=tuple(token_ids))
        return replace(self, manifest=msgspec.structs.replace(manifest, generation=generation))

    def require_weights(self) -> None:
        """Raises TrioError where the bundle was made with --graphs-only and still is."""
        if self.manifest.weights == "planned":
            raise TrioError(
                f"the bundle {self.path} has graphs but no weights (--graphs-only): complete it "
                "with `trio attach-weights BUNDLE CHECKPOINT`"
            )

    @property
    def tokenizer_path(self) -> Path:
        """tokenizer.json, for `load_tokenizer`."""
        self.require_weights()
        return safe_path(self.path, TOKENIZER)

    @cached_property
    def tokens(self) -> dict[str, Any]:
        """tokens.json: `bos_token`, `eos_token`, `pad_token`, `unk_token`, `image_token` (strings
        or null) and `image_token_id`."""
        return self._object(TOKENS)

    @cached_property
    def preprocessor(self) -> dict[str, Any]:
        """preprocessor.json, what `families.preprocessing.Preprocessor.to_json` gave."""
        return self._object(PREPROCESSOR)

    @cached_property
    def chat_template(self) -> str | None:
        """The Jinja chat template, or None where the checkpoint has none."""
        if CHAT_TEMPLATE not in self.manifest.files:
            return None
        return read_text(safe_path(self.path, CHAT_TEMPLATE), "export the bundle again")

    def _object(self, name: str) -> dict[str, Any]:
        file = safe_path(self.path, name)
        try:
            raw = read_json(file, "export the bundle again")
        except FileNotFoundError:
            raise TrioError(f"the bundle {self.path} lacks {name}: export it again") from None
        if not isinstance(raw, dict):
            raise TrioError(f"{file} does not hold a JSON object: export the bundle again")
        return raw


def _is_weight(name: str) -> bool:
    return name.startswith(WEIGHTS + "/")
