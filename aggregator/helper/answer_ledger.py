"""Which rounds were answered, for ever, and with which bytes, for some time; rows form a chain (`answer_chain`)."""

from __future__ import annotations

import hashlib
from dataclasses import asdict

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from sqlalchemy import Connection, delete, func, insert, select, update

from aggregator.errors import DatabaseError
from aggregator.helper import schema
from aggregator.helper.answer_chain import BEGINNING, AnswerRecord, chain_fault, chained, head_fault, sign_head
from aggregator.helper.answering import PastAnswer
from aggregator.store.database import Database

_RECORD = [schema.answers.c[name] for name in AnswerRecord.__dataclass_fields__]


class LedgerError(DatabaseError):
    """The ledger is not what this helper wrote: nothing is answered with it.

    Args:
        fault: what is wrong.
    """

    def __init__(self, fault: str) -> None:
        super().__init__(f"the ledger of answers was changed: {fault}; see covey-helper audit, and docs/helper.md")
        self.fault = fault


class AnswerLedger:
    """See the module docstring. Every method is one transaction and raises DatabaseError."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def find(self, tenant: str, task: str, number: int) -> PastAnswer | None:
        """A round's answer.

        Raises:
            LedgerError: the bytes are not those that were given then.
        """
        table = schema.answers.c
        query = select(table.manifest_digest, table.included_digest, table.answer_digest, table.answer).where(
            table.tenant == tenant, table.task == task, table.round == number
        )
        with self._database.reading() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            return None
        if row.answer is not None and hashlib.sha256(row.answer).digest() != row.answer_digest:
            raise LedgerError(f"the answer to {tenant}/{task} round {number} was changed")
        return PastAnswer(row.manifest_digest, row.included_digest, row.answer)

    def add(self, record: AnswerRecord, answer: bytes, identity: Ed25519PrivateKey) -> bytes:
        """Keep an answer; durable on return.

        Args:
            record: with the answer's digest.
            answer: signed bytes.
            identity: signs the chain's new head.

        Returns:
            The row's digest in the chain.

        Raises:
            ConflictError: the round was answered meanwhile.
            LedgerError: the chain's end is not what was signed.
        """
        table = schema.answers
        with self._database.transaction() as connection:
            last = connection.execute(
                select(table.c.number, table.c.chain).order_by(table.c.number.desc()).limit(1)
            ).one_or_none()
            number, previous = (last.number, last.chain) if last is not None else (0, BEGINNING)
            # Security: or an answer on top of removed rows would sign that they never were.
            fault = head_fault(number, previous, signature=_head(connection), identity=identity.public_key())
            if fault:
                raise LedgerError(fault)
            chain = chained(previous, record)
            row = {**asdict(record), "number": number + 1, "chain": chain, "answer": answer}
            connection.execute(insert(table).values(**row))
            connection.execute(delete(schema.heads))
            connection.execute(insert(schema.heads).values(id=1, signature=sign_head(chain, identity)))
        return chain

    def drop_bytes(self, before_s: float) -> int:
        """Drop the bytes of answers given before a time; how many."""
        table = schema.answers
        old = update(table).where(table.c.answered_s < before_s, table.c.answer.is_not(None)).values(answer=None)
        with self._database.transaction() as connection:
            return connection.execute(old).rowcount

    def all(self) -> list[tuple[AnswerRecord, bytes]]:
        """Every answered round with its digest in the chain, oldest first."""
        with self._database.reading() as connection:
            return _chain(connection)

    def counts(self) -> dict[str, int]:
        """How many rounds, by study."""
        table = schema.answers.c
        query = select(table.tenant, func.count()).group_by(table.tenant).order_by(table.tenant)
        with self._database.reading() as connection:
            return {row[0]: row[1] for row in connection.execute(query)}

    def check(self, identity: Ed25519PublicKey) -> None:
        """Whether chain and kept answers are as they were written. Raises LedgerError: they are not."""
        table, digest = schema.answers.c, schema.answers.c.answer_digest
        with self._database.reading() as connection:
            rows = _chain(connection)
            fault = chain_fault(rows, head_signature=_head(connection), identity=identity)
            kept = select(table.tenant, table.task, table.round, digest, table.answer).where(table.answer.is_not(None))
            for row in connection.execute(kept.execution_options(yield_per=1)):
                if hashlib.sha256(row.answer).digest() != row.answer_digest:
                    fault = fault or f"the answer to {row.tenant}/{row.task} round {row.round} was changed"
        if fault:
            raise LedgerError(fault)


def _chain(connection: Connection) -> list[tuple[AnswerRecord, bytes]]:
    """Every row with its digest, oldest first."""
    query = select(*_RECORD, schema.answers.c.chain).order_by(schema.answers.c.number)
    return [(AnswerRecord(*row[:-1]), row[-1]) for row in connection.execute(query)]


def _head(connection: Connection) -> bytes | None:
    """The signature over the newest row's digest."""
    signature: bytes | None = connection.execute(select(schema.heads.c.signature)).scalar_one_or_none()
    return signature
