"""The checks of one study: consent, names, certificate, and the way to its broker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

from device_client.adapters.certificate_files import tls_files
from device_client.adapters.tpm2_tls_keys import tls_public_half
from device_client.checks.broker import Way, check_broker
from device_client.checks.examined import Examined, not_looked_at
from device_client.checks.findings import Check, Result, ok, problem
from device_client.checks.identity import (
    Papers,
    check_certificate,
    check_enrolment,
    check_pseudonyms,
    check_told_publishers,
)
from device_client.checks.wearer import check_consent
from device_client.config import StudyConfig
from device_client.consent import Consents, terms_digest, terms_of
from device_client.device_store import load_identity
from device_client.errors import KeyStoreError
from device_client.joining.joiner import kept_state
from device_client.joining.records import JoiningState
from device_client.ports import Transport
from device_client.pseudonyms import Pseudonym, Pseudonyms
from fl_protocol.adapters.config_files import read_file, relative_to_config
from fl_protocol.adapters.connect import make_transport
from fl_protocol.adapters.mqtt import TlsFiles
from fl_protocol.errors import CoveyError


class StudyChecks:
    """The checks of one study that need the store."""

    def __init__(self, device: Examined, study: StudyConfig) -> None:
        self._device, self._study, self._files = device, study, device.files

    def checks(self) -> Iterator[Check]:
        """In order; the broker last, since it takes longest."""
        name = self._study.study
        yield Check("consent", self._consent, name)
        if self._study.id is None:
            yield Check("pseudonyms", self._pseudonyms, name)
            if self._enrolment() is not None:
                yield Check("enrolment", self._enrolled, name)
        else:
            yield Check("identity", self._identity, name)
        yield Check("certificate", self._certificate, name)
        yield Check("broker", self._broker, name)

    def _consent(self) -> Result:
        try:
            return check_consent(self._study.study, self._no_consent())
        except CoveyError as error:
            return not_looked_at(error)

    def _no_consent(self) -> str:
        """Why the study may not run; empty if it may. Raises CoveyError."""
        terms = terms_digest(terms_of(self._study, self._files.config.privacy))
        return Consents(self._device.store).problem(self._study.study, terms=terms)

    def _names(self) -> Pseudonyms:
        """Raises CoveyError."""
        return Pseudonyms(self._device.store, tenant=self._study.tenant, task=self._study.task)

    def _pseudonyms(self) -> Result:
        try:
            names = self._names()
        except CoveyError as error:
            return not_looked_at(error)
        state = self._enrolment()
        are_renewed = state is not None and state.membership is not None
        return check_pseudonyms(names, now_s=self._device.now_s, are_renewed=are_renewed)

    def _enrolment(self) -> JoiningState | None:
        """What is kept of the enrolment; None where there is none, or where it may not be looked at."""
        try:
            return kept_state(self._device.store, self._study.study)
        except CoveyError:  # reported by the pseudonyms' check
            return None

    def _enrolled(self) -> Result:
        state = self._enrolment()
        if state is None:
            return problem("the enrolment cannot be read any more")
        found = check_enrolment(state, self._names(), now_s=self._device.now_s)
        return (check_told_publishers(state, self._study) if found.verdict == "ok" else None) or found

    def _identity(self) -> Result:
        try:
            store = self._device.store
        except CoveyError as error:
            return not_looked_at(error)
        load_identity(store, self._study.study)
        return ok(f"goes by the fixed name {self._study.id} and has its signing key; a fixed name never changes")

    def _current(self) -> Pseudonym | None:
        """The present pseudonym, if there is one. Raises CoveyError."""
        current = self._names().current(self._device.now_s)
        return current if isinstance(current, Pseudonym) else None

    def _certificate(self) -> Result:
        now_s, broker, path = self._device.now_s, self._study.broker, self._files.path
        if self._study.id is not None:
            if not (broker.ca and broker.certificate and broker.key):
                return ok("none is configured: the broker is spoken to without TLS")
            parts = {"ca": broker.ca, "certificate": broker.certificate, "key": broker.key}
            found = {kind: read_file(relative_to_config(path, name), f"broker.{kind}") for kind, name in parts.items()}
            return check_certificate(Papers(**found), name=self._study.id, now_s=now_s, public_half=tls_public_half)
        try:
            current = self._current()
        except CoveyError as error:
            return not_looked_at(error)
        if current is None:
            return problem("there is none for now, since no pseudonym is for now", "see pseudonyms above")
        papers = Papers(current.ca, current.certificate, current.tls_key)
        try:
            return check_certificate(
                papers, name=current.id, now_s=now_s, is_replaced=True, public_half=tls_public_half
            )
        except KeyStoreError as error:
            return problem(str(error), "put the TPM right, or take the device out of the study and enrol it again")

    def _broker(self) -> Result:
        broker = self._study.broker
        with ExitStack() as stack:
            name, tls = self._who(stack)

            def mqtt(client_id: str = name) -> Transport:
                return make_transport(broker, config=self._files.path, client_id=client_id, tls=tls)

            return check_broker(
                Way(
                    host=broker.host,
                    port=broker.port,
                    identified=bool(name),
                    tls=tls,
                    mqtt=None if self._device.daemon_runs else mqtt,
                )
            )

    def _who(self, stack: ExitStack) -> tuple[str, TlsFiles | None]:
        """Name and TLS files to connect with; an empty name where the device may not or cannot show itself."""
        broker, path = self._study.broker, self._files.path
        try:
            if self._no_consent():
                return "", None
            current = None if self._study.id is not None else self._current()
        except CoveyError:  # reported by its own check
            return "", None
        if current is not None:
            return current.id, stack.enter_context(tls_files(current))
        if broker.ca and broker.certificate and broker.key:
            files = (relative_to_config(path, name) for name in (broker.ca, broker.certificate, broker.key))
            return self._study.id or "", TlsFiles(*files)
        return self._study.id or "", None
