"""Protobuf's text format, as a config.pbtxt has it."""

from __future__ import annotations

from trio_deploy.serve.triton_server.pbtxt import Enum, format_message


def test_text_format_quotes_strings_and_leaves_enumerations_bare():
    message = {
        "name": 'a"\\\n',
        "kind": Enum("KIND_CPU"),
        "dims": [-1, 3],
        "none": None,
        "on": True,
    }
    assert format_message({"m": [message, {}]}) == (
        'm {\n  name: "a\\"\\\\\\n"\n  kind: KIND_CPU\n  dims: [-1, 3]\n  on: true\n}\nm {\n}\n'
    )
