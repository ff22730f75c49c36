"""OpenVINO's engines after memory ran out."""

import weakref
from typing import Any

import pytest

from trio_deploy.errors import OutOfMemory
from trio_deploy.runtimes.openvino import OvEngine


class _Model:
    """A compiled model without ports, whose first request finds no memory."""

    inputs: tuple[Any, ...] = ()
    outputs: tuple[Any, ...] = ()

    def __init__(self, fails: bool) -> None:
        self._fails = fails

    def get_property(self, name: str) -> Any:
        return ["CPU"] if name == "EXECUTION_DEVICES" else _Type()

    def create_infer_request(self) -> Any:
        return _Request(self._fails)


class _Type:
    def get_type_name(self) -> str:
        return "f32"


class _Request:
    def __init__(self, fails: bool) -> None:
        self._fails = fails

    def start_async(self) -> None:
        if self._fails:
            raise RuntimeError("std::bad_alloc")

    def wait(self) -> None:
        pass


def test_the_model_that_ran_out_of_memory_is_freed_before_another_is_compiled() -> None:
    models: list[weakref.ref[_Model]] = []
    alive: list[bool] = []

    def compile_model() -> tuple[_Model, None]:
        alive.append(any(model() is not None for model in models))
        if len(alive) == 2:  # there is no memory for it yet
            raise OutOfMemory("out of memory")
        model = _Model(fails=not models)
        models.append(weakref.ref(model))
        return model, None

    engine = OvEngine(None, compile_model)
    for _ in range(2):
        with pytest.raises(OutOfMemory):
            engine.run({})
    assert engine.run({}) == engine.run({}) == {}
    assert alive == [False, False, False]
