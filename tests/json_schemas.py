"""Whether a value is what a schema of docs/schema says: the part of JSON Schema that they use.

Source: JSON Schema 2020-12, "Core" and "Validation". A keyword that is not known fails the test.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import msgspec

DIRECTORY = Path(__file__).parents[1] / "docs" / "schema"
_TYPES = {
    "object": dict, "array": list, "string": str, "integer": int, "number": (int, float),
    "boolean": bool, "null": type(None),
}  # fmt: skip
_SILENT = {"title", "description", "default", "$defs", "$schema", "$id", "format", "examples"}


def check(name: str, value: Any) -> None:
    """Fails with the place where `value` is not what docs/schema/NAME.json says."""
    whole = json.loads((DIRECTORY / f"{name}.json").read_text())
    _check(whole, whole, value, "$")


def _check(whole: dict, schema: dict, value: Any, place: str) -> None:
    for keyword, wanted in schema.items():
        match keyword:
            case "$ref":
                _check(whole, whole["$defs"][wanted.removeprefix("#/$defs/")], value, place)
            case "type":
                types = [wanted] if isinstance(wanted, str) else wanted
                assert any(_is(value, name) for name in types), f"{place} is no {wanted}: {value!r}"
            case "enum":
                assert value in wanted, f"{place} is none of {wanted}: {value!r}"
            case "const":
                assert value == wanted, f"{place} is not {wanted}: {value!r}"
            case "anyOf":
                assert any(_fits(whole, one, value, place) for one in wanted), f"{place}: {value!r}"
            case "properties":
                for key in wanted.keys() & value.keys():
                    _check(whole, wanted[key], value[key], f"{place}.{key}")
            case "required":
                assert set(wanted) <= value.keys(), f"{place} lacks {set(wanted) - value.keys()}"
            case "additionalProperties":
                for key in value.keys() - schema.get("properties", {}).keys():
                    assert wanted is not False, f"{place}.{key} is unknown"
                    if wanted is not True:
                        _check(whole, wanted, value[key], f"{place}.{key}")
            case "items":
                for index, item in enumerate(value):
                    _check(whole, wanted, item, f"{place}[{index}]")
            case "minimum":
                assert value >= wanted, f"{place} is {value}"
            case "maximum":
                assert value <= wanted, f"{place} is {value}"
            case "maxLength":
                assert len(value) <= wanted, place
            case "pattern":
                assert re.search(wanted, value), f"{place} is {value!r}"
            case _:
                assert keyword in _SILENT, f"{keyword} of {place} is not known here"


def unknown_keys(name: str, value: dict) -> set[str]:
    """Keys of the outer object that the schema does not have."""
    whole = json.loads((DIRECTORY / f"{name}.json").read_text())
    outer = whole["$defs"][whole["$ref"].removeprefix("#/$defs/")]
    return value.keys() - outer["properties"].keys()


def _fits(whole: dict, schema: dict, value: Any, place: str) -> bool:
    try:
        _check(whole, schema, value, place)
    except AssertionError:
        return False
    return True


def _is(value: Any, name: str) -> bool:
    is_bool = isinstance(value, bool)
    return isinstance(value, _TYPES[name]) and (not is_bool or name == "boolean")


def made() -> dict[str, bytes]:
    """What each file of docs/schema should have in it, by its name."""
    from supervisor.cli.connection_report import ConnectionList
    from supervisor.config import Config
    from supervisor.diag.model import Report
    from supervisor.log_book import LogEntry
    from supervisor.status import Status
    from workers.proxy.resource_rows import Listing

    types = {
        "configuration": Config, "connections": ConnectionList, "diag": Report, "logs": LogEntry,
        "ls": Listing, "status": Status,
    }  # fmt: skip
    return {
        f"{name}.json": msgspec.json.format(msgspec.json.encode(msgspec.json.schema(kind))) + b"\n"
        for name, kind in types.items()
    }


if __name__ == "__main__":
    # python tests/json_schemas.py writes them. Beside this file lies another folder `workers`.
    sys.path[0] = str(DIRECTORY.parents[1])
    for file_name, content in made().items():
        (DIRECTORY / file_name).write_bytes(content)
