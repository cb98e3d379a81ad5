"""docs/protocol.md: its round trip runs, and it names every field, reason, context, limit and vector file there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fl_protocol import limits, signing
from fl_protocol.errors import RefusalReason
from fl_protocol.message_base import Msg
from tests.vectors.generate import FOLDER

PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
KINDS = [kind for kind in Msg.__subclasses__() if kind.__module__.startswith("fl_protocol.")]
"""The protocol's; the simulator has one of its own, which goes over no wire."""


def test_the_worked_round_trip_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    scope: dict[str, object] = {}
    exec(compile(code, "docs/protocol.md", "exec"), scope)  # noqa: S102 - our own page
    assert "proof" in scope


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_message_has_a_table_of_its_fields_in_their_order(kind: type[Msg]) -> None:
    _, _, section = PAGE.partition(f"**{kind.__name__}**")
    table = section[: section.index("\n\n", section.index("| field |"))]
    cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    named = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    tag = kind.__struct_config__.tag_field
    assert (*named, "v") == ((tag, *kind.__struct_fields__) if tag else kind.__struct_fields__)


def test_every_reason_is_explained_and_no_other() -> None:
    section = PAGE[PAGE.index("## 7. ") : PAGE.index("## 8. ")]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == [reason.value for reason in RefusalReason]


def test_every_signing_context_is_given() -> None:
    for kind, context in signing._CONTEXTS.items():
        written = context.decode().replace("\0", "\\0")
        assert re.search(rf"\| `{kind.__name__}` \| \w+ \| `{re.escape(written)}` \|", PAGE)


@pytest.mark.parametrize(
    "row",
    [
        f"| MQTT payload | {limits.MAX_PACKET_BYTES:,} bytes, and the server's MaximumPacketSize − "
        f"{limits.PACKET_RESERVE_BYTES} |",
        f"| transfer (model or update) | {limits.MAX_TRANSFER_BYTES // 2**20} MiB |",
        f"| parameters | {limits.MAX_PARAMETERS:,} |",
        f"| chunks of a transfer | {limits.MAX_CHUNKS:,}, of at least {limits.MIN_CHUNK_DATA_BYTES} bytes |",
        f"| half-sent transfers held for one device | {limits.MAX_OPEN_TRANSFERS} |",
        f"| upload shards | {limits.NUM_SHARDS} |",
    ],
)
def test_every_limit_is_given(row: str) -> None:
    assert row in PAGE


def test_every_vector_file_is_linked() -> None:
    assert set(re.findall(r"\.\./tests/vectors/(\w+)\.json", PAGE)) == {path.stem for path in FOLDER.glob("*.json")}
