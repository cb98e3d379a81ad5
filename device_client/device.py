"""One device: its studies, records, ledger and outbox, bound together over ports; and what an embedding program calls.

`Device.open` takes the real adapters; the simulator and the tests hand in virtual ones. One thread uses a `Device`:
nothing here is called from another.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import ArrayLike

from device_client.config import DeviceConfig, PrivacyConfig, StudyConfig
from device_client.consent import Consents, leave_study, terms_digest, terms_of
from device_client.control_variate import ControlVariate
from device_client.daemon import DeviceDaemon
from device_client.deliveries_log import record_outcome
from device_client.delivery import uniform
from device_client.device_ports import Connection, DevicePorts
from device_client.device_store import kept_chunks, kept_model, load_identity, load_session, study_blob
from device_client.error_feedback import ErrorFeedback, released_in
from device_client.errors import StoreError
from device_client.events import PendingUpdate
from device_client.floors import Floors
from device_client.installed_models import InstalledModels
from device_client.joining.renewal import study_renewal
from device_client.kept_vector import KeptVector
from device_client.ledger import Budget, PrivacyLedger
from device_client.new_records import NewRecords
from device_client.outbox import Outbox, Work
from device_client.participation import LocalWork, Participant
from device_client.ports import Float32, Labels
from device_client.pseudonyms import NoPseudonym, Pseudonyms
from device_client.readiness import Readiness
from device_client.recordings.ingestion import StreamTarget
from device_client.recordings.window_store import Retention, WindowStore
from device_client.session import DeviceSession, SessionConfig
from device_client.settling import unusable
from device_client.status import Status, status_of
from device_client.studies import LONGEST_ABSENCE_S, NoNameError, Studies, WireName
from device_client.study_runner import StudyRunner
from device_client.training import Records
from fl_protocol.adapters.journal import Journal
from fl_protocol.bundle import ModelBundle
from fl_protocol.errors import ConfigError, CoveyError
from fl_protocol.helper_config import pinned
from fl_protocol.messages import RoundManifestMsg
from fl_protocol.model_manifest import label_array
from fl_protocol.topics import update_label

if TYPE_CHECKING:
    from device_client.assembly import RealDevice

_DAY_S = 86_400.0
_HOUR_S = 3600.0


class Device:
    """One device; see the module docstring.

    Args:
        config: a whole ``device.toml``.
        ports: the outside.

    Raises:
        ConfigError: two studies want different records of one stream.
        LedgerError, StoreError: what is stored does not hold together.
        BundleError: a bundle cannot be used, or is older than one that was accepted before.
    """

    def __init__(self, config: DeviceConfig, ports: DevicePorts) -> None:
        self.config, self._ports, self.store = config, ports, ports.store
        self._stopping = self._is_erasing = False
        privacy = config.privacy
        self.ledger = PrivacyLedger(self.store, ports.counter, budget_of(config))
        self.outbox = Outbox(self.store, maximum_bytes=config.device.maximum_outbox_bytes)
        self.consents = Consents(self.store)
        self.pseudonyms = {
            study.study: Pseudonyms(self.store, tenant=study.tenant, task=study.task, tls_keys=ports.tls_keys)
            for study in config.studies
        }
        installed = InstalledModels(self.store)
        self._bundles = {study.study: installed.accepted(study.study, ports.bundle(study)) for study in config.studies}
        self._aggregator_keys = {study.study: ports.aggregator_key(study) for study in config.studies}
        self.streams = self._open_streams()
        self._settle_outbox()
        self.renewals = {
            study.study: study_renewal(
                ports,
                self.pseudonyms[study.study],
                study=study.study,
                may_ask=partial(self._has_consent, study.study),
                changed=partial(self._thrown_out_or_back, study.study),
            )
            for study in config.studies
            if study.id is None
        }
        self.readiness = Readiness(ports.board, ports.clock, config.eligibility)
        self.studies = Studies(
            config.studies,
            privacy=privacy,
            consents=self.consents,
            wire_name=self._wire_name,
            start=self._start,
            connected=self._forget_old_names,
            change_delay_s=lambda: LONGEST_ABSENCE_S * uniform(ports.jitter),
            clock=ports.clock,
            journal=ports.journal,
        )
        self.daemon = DeviceDaemon(
            self.studies,
            self.readiness,
            ports.clock,
            ports.bell,
            ports.watchdog,
            ports.journal,
            prune=lambda now_s: sum(stream.prune(now_s) for stream in self.streams.values()),
            renewals=self.renewals,
        )

    @staticmethod
    def open(config: Path | str, *, journal: Journal | None = None) -> RealDevice:
        """The device that a ``device.toml`` describes, on this machine's hardware.

        Args:
            config: path of the file.
            journal: where events are told; by default nowhere.

        Raises:
            CoveyError: one sentence about what is missing or wrong.
        """
        from device_client.assembly import RealDevice  # noqa: PLC0415 - the simulator needs no real adapters

        return RealDevice.open(Path(config), journal=journal)

    def add(self, x: ArrayLike, label: object, *, stream: str = "default") -> int:
        """Store labelled windows, encrypted and durable on return.

        Args:
            x: one window as the model takes it, or several with the number of windows first, float32.
            label: of the one window, or one for each: class indices, or numbers as the model's labels are.
            stream: which stream of records.

        Returns:
            How many were stored.

        Raises:
            StoreError: they do not fit the model, hold numbers that are not finite, or the disk does not take them.
            ConfigError: there is no such stream.
        """
        target = self._target(stream)
        try:
            windows = np.asarray(x, np.float32)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"x: expected windows of the shape {target.input.shape} ({error})") from error
        single = windows.shape == target.input.shape
        try:
            labels = label_array(np.asarray([label]) if single else label, len(windows), label=target.label)
        except (KeyError, ValueError, TypeError) as error:
            raise ConfigError(f"label: expected labels for {len(windows)} window(s) ({error})") from error
        return target.append(windows[None] if single else windows, labels, at_s=self._ports.clock.now_s())

    def targets(self) -> dict[str, StreamTarget]:
        """Where ingested recordings go, by stream."""
        return {study.stream: self._target(study.stream) for study in self.config.studies}

    def now_s(self) -> float:
        """What the device's clock says, Unix seconds."""
        return self._ports.clock.now_s()

    def status(self) -> Status:
        """What the device is doing and why, for people and for programs."""
        return status_of(self)

    def grant(self, study: str) -> None:
        """Agree to a study (``tenant/task``) under its present terms. Raises ConfigError, StoreError."""
        name = self.study_config(study).study
        terms = terms_digest(self.terms(name))
        if self.consents.problem(name, terms=terms):
            # What was begun under other terms may break these: a role that sends nothing, a higher floor. And a disk
            # may have refused to drop what waited when the study was left.
            if any(runner.study == name for runner in self.studies.running):
                self.studies.stop(name, "its terms have changed")
            self.outbox.drop(name)
        self.consents.grant(name, terms=terms, now_s=self._ports.clock.now_s())
        self.studies.look_again()

    def withdraw(self, study: str) -> int:
        """Leave a study at once; what it has not delivered is dropped.

        Returns:
            How many updates and pieces of work were dropped.

        Raises:
            ConfigError: there is no such study.
            StoreError: the disk does not take it. The study is left until the process ends, and sends nothing more.
        """
        name = self.study_config(study).study
        self.studies.stop(name, "consent was withdrawn")
        return leave_study(self.consents, self.outbox, name, now_s=self._ports.clock.now_s())

    def erase_data(self) -> None:
        """Destroy the key of all recordings and of what was computed from them here, then the files.

        What is kept: identities, consents and the ledger, since what was released stays released.

        Raises:
            StoreError: the disk refuses. Nothing of the data is used or sent any more; the device stands still and
                tries again once a minute until it is done.
        """
        self.studies.stop_all()
        self._is_erasing = True
        # Security: what is to be erased must not be sent from memory, whatever the disk says.
        self.outbox.forget()
        self.streams = {}
        self._finish_erasure()

    def _finish_erasure(self) -> None:
        """Do what is left of an erasure that the disk refused; nothing where there is none. Raises StoreError."""
        if not self._is_erasing:
            return
        try:
            self.store.shred("data")
            self.outbox = Outbox(self.store, maximum_bytes=self.config.device.maximum_outbox_bytes)
            self.streams = self._open_streams()
        except StoreError as error:
            raise StoreError(f"the wearer's data is to be erased, and the disk refuses: {error}") from error
        self._is_erasing = False

    def consent_problem(self, study: str) -> str:
        """Why a study may not run, in words; empty when it may. Raises ConfigError, StoreError."""
        return self.consents.problem(self.study_config(study).study, terms=terms_digest(self.terms(study)))

    def terms(self, study: str) -> dict[str, str]:
        """What granting a study means, in words. Raises ConfigError."""
        return terms_of(self.study_config(study), self.config.privacy)

    def study_config(self, study: str) -> StudyConfig:
        """A study's configuration by ``tenant/task``, or by its task where only one has it. Raises ConfigError."""
        return self.config.study_named(study)

    def step(self) -> None:
        """One turn of the daemon's loop; waits at most a minute for something to do."""
        self.daemon.step()

    def run(self) -> None:
        """Take part until `stop`."""
        while not self._stopping:
            self.step()

    def stop(self) -> None:
        """End `run`; may be called from any thread, and from a signal handler."""
        self._stopping = True
        self._ports.bell.ring()

    def close(self) -> None:
        """Put training aside and say goodbye to the brokers; what is pending stays in the outbox."""
        self.daemon.close()

    def _target(self, stream: str) -> StreamTarget:
        """A stream's schema and store. Raises ConfigError."""
        first = next((study for study in self.config.studies if study.stream == stream), None)
        if first is None:
            known = ", ".join(sorted({study.stream for study in self.config.studies}))
            raise ConfigError(f"stream {stream}: expected one of {known}")
        manifest = self._bundles[first.study].manifest
        return StreamTarget(manifest.input, manifest.label, partial(self._append, stream))

    def _append(self, stream: str, x: Float32, y: Labels, *, at_s: float) -> int:
        """Store records of a stream, once an erasure that was begun is finished. Raises StoreError."""
        self._finish_erasure()
        return self.streams[stream].append(x, y, at_s=at_s)

    def _open_streams(self) -> dict[str, WindowStore]:
        """One store of windows per stream; studies that share one must want the same."""
        settings, streams, schemas = self.config.records, {}, dict[str, Any]()
        retention = Retention(settings.maximum_count, settings.maximum_age_days * _DAY_S)
        for study in self.config.studies:
            manifest = self._bundles[study.study].manifest
            schema = (manifest.input, manifest.label)
            if schemas.setdefault(study.stream, schema) != schema:
                raise ConfigError(
                    f"study {study.study}: its model takes other recordings than another study of stream "
                    f"{study.stream}; give it a stream of its own"
                )
            if study.stream not in streams:
                streams[study.stream] = WindowStore(
                    self.store,
                    study.stream,
                    window_shape=manifest.input.shape,
                    label=manifest.label,
                    retention=retention,
                    held_out_fraction=settings.held_out_fraction,
                )
        return streams

    def _settle_outbox(self) -> None:
        """After a power cut: note releases that were sealed but not noted, give up what may have been released."""
        studies = [study.study for study in self.config.studies]
        for entry, reason in unusable(self.outbox, self.ledger, studies, now_s=self._ports.clock.now_s()):
            self._give_up(entry, reason)

    def _give_up(self, entry: Work | PendingUpdate, reason: str) -> None:
        """Never use an entry of the outbox again, and say why."""
        event = "work_given_up" if isinstance(entry, Work) else "update_given_up"
        label, now_s = update_label(entry.update_id), self._ports.clock.now_s()
        self._ports.journal.write(event, at_s=now_s, study=entry.study, update=label, reason=reason)
        with suppress(StoreError):  # it is out of use in any case, and the outbox tries again
            self.outbox.give_up(entry.update_id)

    def _has_consent(self, study: str) -> bool:
        """Whether a study may run. Raises StoreError."""
        return not self.consent_problem(study)

    def _thrown_out_or_back(self, study: str) -> None:
        """The study's operator has thrown this device out, or has taken it back; everything is kept."""
        if words := self.renewals[study].why_out:
            self.studies.stop(study, words)
        self.studies.look_again()

    def _wire_name(self, study: StudyConfig, now_s: float) -> WireName:
        """The present name of a study. Raises NoNameError."""
        if study.id is not None:
            return WireName(study.id, np.inf, np.inf)
        renewal, current = self.renewals[study.study], self.pseudonyms[study.study].current(now_s)
        if renewal.is_out:
            raise NoNameError(renewal.why_out)
        if isinstance(current, NoPseudonym):
            asked = "; its desk is asked for further ones" if renewal.joiner.is_enrolled else ""
            raise NoNameError(current.words + asked)
        # What waits under an older name is delivered first, as long as its certificate lasts.
        for name in dict.fromkeys(pending.device for pending in self.outbox.of(study.study)):
            older = self.pseudonyms[study.study].get(name)
            if older is not None and older.id != current.id and older.is_valid(now_s):
                return WireName(older.id, now_s, older.not_after_s)
        return WireName(current.id, current.period.ends_s, current.not_after_s)

    def _forget_old_names(self, study: StudyConfig) -> None:
        """The broker accepted the present name, so the clock is right: names whose time is over go, with their keys
        and the updates that were sealed for them.
        """
        names, now_s = self.pseudonyms[study.study], self._ports.clock.now_s()
        names.forget_expired(now_s)
        for pending in self.outbox.of(study.study):
            # Nobody can send it any more, and what stays would in time leave no room for other updates.
            if pending.device != study.id and names.get(pending.device) is None:
                record_outcome(self.store, pending.update_id, "expired", now_s=now_s)
                self.outbox.discard(pending.update_id)
                reason = "the name on the wire that it was sealed for has ended"
                self._ports.journal.write(
                    "update_expired",
                    at_s=now_s,
                    study=study.study,
                    update=update_label(pending.update_id),
                    round=pending.round,
                    reason=reason,
                )

    def _start(self, study: StudyConfig, name: WireName) -> StudyRunner:
        """A runner for a study, connecting. Raises CoveyError."""
        self._finish_erasure()
        ports, bundle = self._ports, self._bundles[study.study]
        participant = self._participant(study, name.device, bundle)
        work, manifest = self._interrupted(participant, bundle)
        session = DeviceSession(
            self._session_config(study, name.device, bundle),
            entropy=ports.jitter,
            state=load_session(self.store, study.study),
            outbox=[pending for pending in self.outbox.of(study.study) if pending.device == name.device],
            kept_chunks=kept_chunks(self.store, study.study),
            kept_model=kept_model(self.store, study.study),
            working_on=manifest,
            downloads=ports.downloads,
        )
        will = session.offline_presence()
        pseudonym = self.pseudonyms[study.study].get(name.device)
        transport = ports.connect(Connection(study, name.device, pseudonym, will.topic, will.payload))
        transport.open()
        return StudyRunner(
            study=study.study,
            session=session,
            participant=participant,
            store=self.store,
            transport=transport,
            clock=ports.clock,
            journal=ports.journal,
            role=study.role,
            new_records=self._new_records(study),
            work=work,
            joiner=self.renewals[study.study].joiner if pseudonym is not None else None,
            reason=self.readiness.reason,
        )

    def _participant(self, study: StudyConfig, device: str, bundle: ModelBundle) -> Participant:
        """What participations in a study need."""
        store, stream, shared = self.store, self.streams[study.stream], bundle.manifest.num_shared_parameters
        pseudonym = self.pseudonyms[study.study].get(device)
        key: Ed25519PrivateKey = pseudonym.signing_key if pseudonym is not None else load_identity(store, study.study)
        measures_all = study.role == "evaluate"
        return Participant(
            study=study.study,
            device=device,
            signing_key=key,
            ledger=self.ledger,
            graph=self._ports.graph(bundle),
            input_shape=bundle.manifest.input.shape,
            training_records=stream.training,
            held_out_records=partial(_all_records if measures_all else _held_out_records, stream),
            personal=KeptVector(store, name=study_blob("personal", study.study), initial=bundle.params[shared:]),
            control=ControlVariate(self.store, name=study_blob("control", study.study), length=shared),
            feedback=ErrorFeedback(
                store, name=study_blob("residual", study.study), length=shared, released=released_in(self.ledger)
            ),
            outbox=self.outbox,
            entropy=self._ports.entropy,
            credential=pseudonym.credential if pseudonym is not None else None,
            trainer=self._ports.trainer,
            sealer=self._ports.sealer,
            vectors=self._ports.vectors,
        )

    def _interrupted(
        self, participant: Participant, bundle: ModelBundle
    ) -> tuple[LocalWork | None, RoundManifestMsg | None]:
        """Training that the last process was in the middle of."""
        work = self.outbox.work(participant.study)
        if work is None:
            return None, None
        now_s, manifest = self._ports.clock.now_s(), work.decoded_manifest()
        try:
            if work.device != participant.device:
                raise NoNameError("the name on the wire has changed since")
            given = manifest.graph_digest, manifest.num_parameters
            if given != (bundle.graph_digest, bundle.manifest.num_shared_parameters):
                raise StoreError("it was begun with another model than this device has now")
            return participant.go_on(work, now_s=now_s), manifest
        except CoveyError as error:
            self._give_up(work, str(error))
            return None, None

    def _session_config(self, study: StudyConfig, device: str, bundle: ModelBundle) -> SessionConfig:
        """Who the device is in a study."""
        privacy, eligibility = self.config.privacy, self.config.eligibility
        pseudonym = self.pseudonyms[study.study].get(device)
        return SessionConfig(
            tenant=study.tenant,
            task=study.task,
            device=device,
            role=study.role,
            aggregator_key=self._aggregator_keys[study.study],
            graph_digest=bundle.graph_digest,
            num_parameters=bundle.manifest.num_shared_parameters,
            floors=floors_of(privacy),
            software=self._ports.software,
            minimum_separation_s=eligibility.minimum_separation_hours * _HOUR_S,
            counts_records=True,
            tags=frozenset(study.tags),
            input_shape=bundle.manifest.input.shape,
            maximum_participations=study.maximum_participations,
            helpers=pinned(study.helpers),
            period=pseudonym.period if pseudonym is not None else None,
            tells_why_every_s=60.0 * study.tells_why_every_minutes,
        )

    def _new_records(self, study: StudyConfig) -> NewRecords | None:
        """The wearer's rule about new records, if there is one."""
        eligibility, stream = self.config.eligibility, self.streams[study.stream]
        if not eligibility.minimum_new_records:
            return None
        return NewRecords(
            minimum=eligibility.minimum_new_records,
            noise=eligibility.new_records_noise,
            appended=lambda: stream.appended,
            ledger=self.ledger,
            entropy=self._ports.entropy,
            store=self.store,
            name=study_blob("counted", study.study),
        )


def floors_of(privacy: PrivacyConfig) -> Floors:
    """The least privacy that the wearer accepts."""
    clip, steps = privacy.maximum_l2_norm_clip, privacy.maximum_local_steps
    return Floors(
        privacy.minimum_noise_multiplier,
        privacy.minimum_cohort,
        np.inf if clip is None else clip,
        maximum_local_steps=np.inf if steps is None else steps,
        minimum_helpers=privacy.minimum_helpers,
        minimum_operators=privacy.minimum_operators,
        minimum_sum_noise_multiplier=privacy.minimum_sum_noise_multiplier,
    )


def budget_of(config: DeviceConfig) -> Budget:
    """The wearer's budget, with the studies' shares."""
    privacy = config.privacy
    shares: Mapping[str, float] = {study.study: study.epsilon for study in config.studies if study.epsilon is not None}
    period_s = None if privacy.period_days is None else privacy.period_days * _DAY_S
    return Budget(privacy.epsilon, privacy.delta, period_s=period_s, per_task=shares)


def _held_out_records(stream: WindowStore) -> Records:
    """Those that are never trained on; where there are none, nothing is read and decrypted to find that out."""
    return stream.held_out() if stream.held_out_count else Records(np.empty(0, np.float32), np.empty(0, np.int32))


def _all_records(stream: WindowStore) -> Records:
    """Every record, on a device that trains on none."""
    parts = stream.training(), stream.held_out()
    return Records(np.concatenate([part.x for part in parts]), np.concatenate([part.y for part in parts]))
