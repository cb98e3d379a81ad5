"""One client of Flower's SecAgg+ beside one device of ours, in one process and in turns; runs in Flower's environment.

The client is Flower's own ``secaggplus_mod``, called as its ClientApp calls it, stage by stage: key generation; shares
for its neighbours, encrypted; decryption of theirs, quantisation, its own mask and a pairwise one for every neighbour;
the shares that unmask. What its server and its neighbours would send comes from Flower's functions, outside the time,
except that the neighbours' shares are random bytes of the right length, which the client only hands on. Counted as sent
is the serialised content of its four answers. Settings are Flower's defaults (clip 8, 2^22 levels, modulus 2^32); a
secret can be put together from two thirds of its shares.

Ours is `benchmarks.secure_case`, on the grid that is used there, and on Flower's own: 16 / 2^22 = 2^-18. Neither
counts transport, nor ``flower_over_covey`` the seal to the aggregator that every update of ours has, secure or not;
``flower_over_covey_upload`` does, and so do ``bytes_up``. Ratios are of processor time: on a machine that others use,
too, the longer of two steps loses more of the wall clock.

    .peers/flower_secagg/bin/python -m benchmarks.peers.flower_secagg       # JSON, one row for each case
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.app.message_type import MessageType
from flwr.client.mod.secure_aggregation.secaggplus_mod import secaggplus_mod
from flwr.common import Code, FitRes, Status, bytes_to_ndarray, ndarrays_to_parameters
from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt, generate_shared_key
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_concat
from flwr.common.serde import recorddict_to_proto
from flwr.compat.common.recorddict_compat import fitres_to_recorddict
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, generate_key_pairs, public_key_to_bytes
from flwr.supercore.task_identity import TaskIdentity

from benchmarks.secure_case import STEP, case_of, device_steps, update_of, whole_upload
from benchmarks.timing import Lengths, alternate, timed

CASES = (
    (50, 100_000, 50),
    (100, 100_000, 100),
    (100, 9_000, 15),
    (20, 9_000, 20),
    (50, 9_000, 50),
    (100, 100_000, 15),
    (50, 1_000_000, 50),
)
"""Clients, numbers in an update, and shares; as many shares as clients: everybody is everybody's neighbour."""
THRESHOLD = 2 / 3
CLIP, LEVELS, MODULUS, MAX_WEIGHT = 8.0, 1 << 22, 1 << 32, 1000.0
"""`flwr.server.workflow.SecAggPlusWorkflow`'s defaults."""
FLOWERS_STEP = 2 * CLIP / LEVELS
STAGES = {
    Stage.SETUP: "keys",
    Stage.SHARE_KEYS: "share_keys",
    Stage.COLLECT_MASKED_VECTORS: "mask",
    Stage.UNMASK: "unmask",
}


class FlowerSecaggError(Exception):
    """Flower's client did not answer as its protocol says."""


@dataclass
class Neighbour:
    """Another client, as far as the measured one sees it."""

    number: int
    keys: list[Any] = field(default_factory=lambda: [generate_key_pairs(), generate_key_pairs()])

    def public(self) -> list[bytes]:
        """Both its public keys: for masks, and for shares."""
        return [public_key_to_bytes(public) for _, public in self.keys]


class Client:
    """The measured client with its neighbours.

    Args:
        clients: in the round.
        length: numbers in an update, one float32 array.
        shares: of each secret; one less neighbours.
        threshold: the part of the shares that a secret takes.
    """

    def __init__(self, clients: int, length: int, shares: int, *, threshold: float) -> None:
        self.clients, self.shares, self.threshold = clients, shares, round(threshold * shares)
        self.number, *others = (int.from_bytes(os.urandom(8), "big") >> 1 for _ in range(shares))
        self.neighbours = [Neighbour(number) for number in others]
        self.update = update_of(length)
        self.stages: dict[str, list[float]] = {name: [] for name in STAGES.values()}
        self.cpu_ms: list[float] = []
        self.sent: dict[str, int] = {}

    def one_round(self) -> float:
        """Milliseconds of the client in one round; `cpu_ms` gets those of its processor."""
        self.cpu_ms.append(0.0)
        context = Context(run_id=1, node_id=self.number, node_config={}, state=RecordDict(), run_config={})
        mine = self._answer(context, Stage.SETUP, self._settings())
        public = [mine[Key.PUBLIC_KEY_1], mine[Key.PUBLIC_KEY_2]]
        everyone = {str(one.number): one.public() for one in self.neighbours}
        self._answer(context, Stage.SHARE_KEYS, everyone | {str(self.number): public})
        sources = [one.number for one in self.neighbours]
        texts = [self._shares_of(one, public[1]) for one in self.neighbours]
        masked = self._answer(
            context, Stage.COLLECT_MASKED_VECTORS, {Key.CIPHERTEXT_LIST: texts, Key.SOURCE_LIST: sources}
        )
        if [bytes_to_ndarray(one).size for one in masked[Key.MASKED_PARAMETERS]] != [1, len(self.update)]:
            raise FlowerSecaggError("expected a masked weight and a masked vector of the update's length")
        everybody = {Key.ACTIVE_NODE_ID_LIST: [*sources, self.number], Key.DEAD_NODE_ID_LIST: []}
        if len(self._answer(context, Stage.UNMASK, everybody)[Key.SHARE_LIST]) != self.shares:
            raise FlowerSecaggError(f"expected {self.shares} shares")
        return sum(times[-1] for times in self.stages.values())

    def _answer(self, context: Context, stage: str, configs: dict[str, Any]) -> ConfigRecord:
        """Let the client handle a stage's message; its time and its answer's size are kept."""
        content = RecordDict({RECORD_KEY_CONFIGS: ConfigRecord({**configs, Key.STAGE: stage})})
        message = Message(content, dst_node_id=self.number, message_type=MessageType.TRAIN)
        trained = self._trained(message)
        start, cpu_start = time.perf_counter(), time.process_time()
        reply = secaggplus_mod(message, context, lambda _message, _context: trained)
        self.stages[STAGES[stage]].append(1000 * (time.perf_counter() - start))
        self.cpu_ms[-1] += 1000 * (time.process_time() - cpu_start)
        self.sent[STAGES[stage]] = recorddict_to_proto(reply.content).ByteSize()
        return reply.content.config_records[RECORD_KEY_CONFIGS]

    def _trained(self, message: Message) -> Message:
        """What the app's training would return."""
        parameters = ndarrays_to_parameters([self.update])
        result = FitRes(Status(Code.OK, ""), parameters, num_examples=100, metrics={})
        return Message(fitres_to_recorddict(result, keep_input=False), reply_to=message)

    def _settings(self) -> dict[str, Any]:
        return {
            Key.SAMPLE_NUMBER: self.clients,
            Key.SHARE_NUMBER: self.shares,
            Key.THRESHOLD: self.threshold,
            Key.CLIPPING_RANGE: CLIP,
            Key.TARGET_RANGE: LEVELS,
            Key.MOD_RANGE: MODULUS,
            Key.MAX_WEIGHT: MAX_WEIGHT,
        }

    def _shares_of(self, neighbour: Neighbour, public_key: bytes) -> bytes:
        """A neighbour's shares for the measured client, encrypted to it."""
        # As Flower cuts secrets: 4 bytes of index, and 16 for each 16 of the padded secret (32 bytes; 306 of a key).
        seed_share, key_share = os.urandom(4 + 48), os.urandom(4 + 320)
        key = generate_shared_key(neighbour.keys[1][0], bytes_to_public_key(public_key))
        return encrypt(key, share_keys_plaintext_concat(neighbour.number, self.number, seed_share, key_share))


def compare(clients: int, length: int, shares: int, *, threshold: float, repeats: int) -> dict[str, Any]:
    """One case: both, in turns."""
    flower = Client(clients, length, shares, threshold=threshold)
    cases = {"": case_of(clients, length), "fine_": case_of(clients, length, step=FLOWERS_STEP)}
    steps = {name + key: step for name, case in cases.items() for key, step in device_steps(case).items()}
    ours = {name: timed(step) for name, step in steps.items()}
    ours |= {name.replace("_ms", "_cpu_ms"): timed(step, time.process_time) for name, step in steps.items()}
    found = alternate({"flower_ms": lambda _calls: [flower.one_round()]} | ours, Lengths(repeats, 20))
    medians = {name: statistics.median(times) for name, times in found.items()}
    medians["flower_cpu_ms"] = statistics.median(flower.cpu_ms[1:])

    def over(ours: str) -> float:
        return round(medians["flower_cpu_ms"] / medians[ours], 1)

    sent = {name: len(whole_upload(case, flower.update, np.zeros(length, np.int64))) for name, case in cases.items()}
    bytes_up = sum(flower.sent.values())
    return {
        "n": clients,
        "d": length,
        "shares": shares,
        "threshold": flower.threshold,
        **{name: round(value, 3) for name, value in medians.items()},
        "flower_stages_ms": {name: round(statistics.median(times), 2) for name, times in flower.stages.items()},
        "flower_over_covey": over("device_whole_cpu_ms"),
        "flower_over_covey_wall": round(medians["flower_ms"] / medians["device_whole_ms"], 1),
        "flower_over_covey_upload": over("device_upload_cpu_ms"),
        "flower_over_covey_fine": over("fine_device_whole_cpu_ms"),
        "flower_bytes_up": bytes_up,
        "bytes_up": sent[""],
        "bytes_over_flower": round(sent[""] / bytes_up, 3),
        "bytes_over_flower_fine": round(sent["fine_"] / bytes_up, 3),
        "bits": cases[""].terms.fixed_point.bits,
        "fine_bits": cases["fine_"].terms.fixed_point.bits,
        "step": STEP,
        "fine_step": FLOWERS_STEP,
    }


def main() -> None:
    """Measure, and print JSON."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--repeats", type=int, default=5, help="rounds of Flower's client that count (default 5)")
    command.add_argument("--threshold", type=float, default=THRESHOLD, help="part of the shares that a secret takes")
    command.add_argument("--case", type=int, nargs=3, action="append", metavar=("CLIENTS", "NUMBERS", "SHARES"))
    arguments = command.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # the server's, whose messages are made here
    rows = []
    for clients, length, shares in arguments.case or CASES:
        print(f"flower_secagg: {clients} clients, {length} numbers, {shares} shares", file=sys.stderr, flush=True)
        rows.append(compare(clients, length, shares, threshold=arguments.threshold, repeats=arguments.repeats))
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
