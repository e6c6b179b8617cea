"""The generated modules are what the script makes of the .proto files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from workers.proxy.teleport.pb import auth_pb2, types_pb2

ROOT = Path(__file__).parents[3]
GENERATED = Path("workers/proxy/teleport/pb")


def test_the_script_reproduces_the_generated_modules(tmp_path):
    pytest.importorskip("grpc_tools", reason="protoc is in the development environment only")
    environment = os.environ | {"VNET_VENV": sys.prefix}
    script = ROOT / "scripts/generate-protobuf"
    subprocess.run([script, tmp_path], check=True, cwd=tmp_path, env=environment)
    made = {p.name: p.read_text() for p in (tmp_path / GENERATED).iterdir()}
    kept = {
        p.name: p.read_text()
        for p in (ROOT / GENERATED).iterdir()
        if "_pb2" in p.name or "_grpc" in p.name
    }
    assert made == kept


def test_field_numbers_are_those_of_teleport():
    request = auth_pb2.UserCertsRequest(
        RouteToApp=auth_pb2.RouteToApp(Name="a", PublicAddr="b", TargetPort=9), TLSPublicKey=b"k"
    )
    assert request.SerializeToString() == b"\x5a\x08\x0a\x01a\x1a\x01b\x48\x09\xba\x01\x01k"


def test_fields_of_newer_servers_are_ignored():
    app = types_pb2.AppSpecV3(URI="tcp://x")
    newer = app.SerializeToString() + b"\x7a\x00" + b"\xfa\x06\x01z"
    assert types_pb2.AppSpecV3.FromString(newer).URI == "tcp://x"


def test_times_of_the_year_1_and_unknown_parts_of_a_resource_are_harmless():
    server = types_pb2.DatabaseServerV3(
        Metadata=types_pb2.Metadata(Name="pg", Expires={"seconds": -62135596800})
    )
    # A status (field 6) of a newer version, with a number and with bytes that are no text.
    newer = server.SerializeToString() + b"\x32\x06\x30\x01\x3a\x02\xff\xfe"
    read = types_pb2.DatabaseServerV3.FromString(newer)
    assert read.Metadata.Name == "pg"
    assert read.Metadata.Expires.ToDatetime().year == 1
