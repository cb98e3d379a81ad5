"""The tables of the aggregator's database (SQLAlchemy Core). Large values are blobs; here are only their keys.

`aggregator.store.migrations` takes a database of any earlier version to this schema; the two are compared by a test.
"""

from __future__ import annotations

from sqlalchemy import (
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData()
devices = Table(
    "devices",
    metadata,
    Column("device", String(64), primary_key=True),
    Column("public_key", LargeBinary(32), nullable=False),
    Column("added_s", Float, nullable=False),
    Index("ix_devices_public_key", "public_key"),
)
# No row means always.
device_periods = Table(
    "device_periods",
    metadata,
    Column("device", String(64), primary_key=True),
    Column("not_before_s", Float, nullable=False),
    Column("not_after_s", Float, nullable=False),
)
tasks = Table(
    "tasks",
    metadata,
    Column("task", String(64), primary_key=True),
    Column("spec", Text, nullable=False),  # the task file; empty for a task from before there were such files
    Column("bundle", String(200), nullable=False),  # blob
    Column("validation", String(200)),  # blob
    Column("graph_digest", LargeBinary(32), nullable=False),
    Column("phase", String(16), nullable=False),
    Column("number", Integer, nullable=False),
    Column("committed", Integer, nullable=False),
    Column("version", Integer, nullable=False),
    Column("pausing", Boolean, nullable=False),
    Column("failures", Integer, nullable=False),
    Column("reason", Text, nullable=False),
    Column("probability", Float, nullable=False),
    Column("created_s", Float, nullable=False),
)
# What operators ask for; the coordinator carries it out.
orders = Table(
    "orders",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("task", String(64), nullable=False),
    Column("name", String(16), nullable=False),
    Column("argument", Text, nullable=False),
    Column("asked_s", Float, nullable=False),
    Column("done_s", Float),
    Column("outcome", Text, nullable=False),
)
models = Table(
    "models",
    metadata,
    Column("task", String(64), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("parent", Integer),
    Column("round", Integer),
    Column("origin", String(16), nullable=False),
    Column("digest", LargeBinary(32), nullable=False),
    Column("params", String(200)),  # blob; none once it was pruned
    Column("optimiser", String(200)),  # blob
    Column("control", String(200)),  # blob
    Column("population", Integer, nullable=False),
    Column("delta", String(200)),  # blob
    Column("delta_digest", LargeBinary(32)),
    Column("created_s", Float, nullable=False),
    Column("metrics", Text, nullable=False),  # JSON
)
model_tags = Table(
    "model_tags",
    metadata,
    Column("task", String(64), primary_key=True),
    Column("tag", String(64), primary_key=True),
    Column("version", Integer, nullable=False),
)
rounds = Table(
    "rounds",
    metadata,
    Column("task", String(64), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("outcome", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("opened_s", Float, nullable=False),
    Column("deadline_s", Float, nullable=False),
    Column("closed_s", Float),
    Column("kem", String(32), nullable=False),
    Column("secret", LargeBinary),  # erased when no update of the round can count any more
    Column("sums_secret", LargeBinary),  # erased when the round is closed
    Column("manifest", LargeBinary),  # of the engine secure: what contributions are bound to
    Column("asked_s", Float),  # when helpers were first asked for the sum of its masks
    Column("version", Integer, nullable=False),
    Column("model_digest", LargeBinary(32), nullable=False),
    Column("update_length", Integer, nullable=False),  # numbers in an update
    Column("probability", Float, nullable=False),
    Column("late", Integer, nullable=False),
    Column("metrics", Text, nullable=False),  # JSON
)
updates = Table(
    "updates",
    metadata,
    Column("task", String(64), primary_key=True),
    Column("update_id", LargeBinary(16), primary_key=True),
    Column("round", Integer, nullable=False),  # that it was made for
    Column("counted_in", Integer, nullable=False),  # that it is combined in; a later one for a stale update
    Column("device", String(64), nullable=False),
    Column("sealed_digest", LargeBinary(32), nullable=False),
    Column("accepted_s", Float, nullable=False),
    Column("bytes_up", Integer, nullable=False),
    # Where its sealed bytes are, for rules that need single updates.
    Column("segment", String(200)),  # blob
    Column("start", Integer),
    Column("length", Integer),
    # Security: no update is counted twice, no device twice for a round, nor twice in one: a minimum cohort is of
    # devices. Whatever the code above does.
    UniqueConstraint("task", "round", "device", name="uq_updates_task"),
    Index("ix_updates_counted_in", "task", "counted_in", "device", unique=True),
)
# Sums of updates, per worker; the coordinator adds them up.
partials = Table(
    "partials",
    metadata,
    Column("task", String(64), primary_key=True),
    Column("counted_in", Integer, primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("worker", String(64), primary_key=True),
    Column("blob", String(200), nullable=False),
    Column("count", Integer, nullable=False),
)
leases = Table(
    "leases",
    metadata,
    Column("name", String(16), primary_key=True),
    Column("worker", String(64), nullable=False),
    Column("until_s", Float, nullable=False),
)
workers = Table(
    "workers",
    metadata,
    Column("worker", String(64), primary_key=True),
    Column("started_s", Float, nullable=False),
    Column("seen_s", Float, nullable=False),
    Column("state", String(16), nullable=False),
    Column("detail", Text, nullable=False),
)
refusals = Table(
    "refusals",
    metadata,
    Column("task", String(64), primary_key=True),
    Column("reason", String(32), primary_key=True),
    Column("times", Integer, nullable=False),
)
# Who devices belong to, and how many each may have.
owners = Table(
    "owners",
    metadata,
    Column("owner", String(64), primary_key=True),
    Column("quota", Integer, nullable=False),
    Column("created_s", Float, nullable=False),
)
# Security: of a token only the digest of its secret is kept.
enrolment_tokens = Table(
    "enrolment_tokens",
    metadata,
    Column("digest", LargeBinary(32), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("task", String(64), nullable=False),
    Column("created_s", Float, nullable=False),
    Column("expires_s", Float, nullable=False),
    Column("withdrawn_s", Float),
    Column("used_s", Float),
    Column("enrolment", String(64)),  # what it was used for
)
# A device that has joined a study: all its names, one after the other, under one renewal key.
enrolments = Table(
    "enrolments",
    metadata,
    Column("enrolment", String(64), primary_key=True),
    Column("task", String(64), nullable=False),
    Column("owner", String(64), nullable=False),
    Column("renewal_key", LargeBinary(32), nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("enrolled_s", Float, nullable=False),
    Column("changed_s", Float, nullable=False),
    Column("lasts_until_s", Float, nullable=False),
    # The same request again gets the same answer.
    Column("request_digest", LargeBinary(32), nullable=False),
    Column("answer", LargeBinary, nullable=False),
    Index("ix_enrolments_owner", "owner"),
    # Holds all that a quota is counted by, so that the rows with their answers are not read.
    Index("ix_enrolments_quota", "owner", "state", "lasts_until_s"),
)
enrolment_names = Table(
    "enrolment_names",
    metadata,
    Column("device", String(64), primary_key=True),
    Column("enrolment", String(64), nullable=False),
    Column("serial", String(40), nullable=False),  # of its certificate, hexadecimal
    Column("not_before_s", Float, nullable=False),
    Column("not_after_s", Float, nullable=False),
    Index("ix_enrolment_names_enrolment", "enrolment"),
)
# What a CRL lists until it has ended by itself.
revoked_certificates = Table(
    "revoked_certificates",
    metadata,
    Column("serial", String(40), primary_key=True),
    Column("device", String(64), nullable=False),
    Column("revoked_s", Float, nullable=False),
    Column("not_before_s", Float, nullable=False),
    Column("not_after_s", Float, nullable=False),
    Column("enforced_s", Float),  # since when the broker lets it in no more
)
accounts = Table(
    "accounts",
    metadata,
    Column("account", String(64), primary_key=True),
    Column("role", String(16), nullable=False),
    Column("created_s", Float, nullable=False),
    Column("disabled_s", Float),
)
# Security: of a token only an argon2id hash is kept.
access_tokens = Table(
    "access_tokens",
    metadata,
    Column("token", String(32), primary_key=True),  # its public part
    Column("account", String(64), nullable=False),
    Column("secret_hash", Text, nullable=False),
    Column("scopes", Text, nullable=False),  # JSON
    Column("note", Text, nullable=False),
    Column("created_s", Float, nullable=False),
    Column("expires_s", Float, nullable=False),
    Column("revoked_s", Float),
    Column("last_used_s", Float),
    Column("last_address", String(64), nullable=False),
    Index("ix_access_tokens_account", "account"),
)
# Append-only; `aggregator.audit` says what each digest covers.
audit_entries = Table(
    "audit_entries",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),  # from 0, without a gap
    # Copies of what the entry says, to find it by; `audit verify` compares them.
    Column("at_s", Float, nullable=False),
    Column("actor", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("entry", LargeBinary, nullable=False),  # canonical JSON
    Column("leaf", LargeBinary(32), nullable=False),
    Index("ix_audit_entries_actor", "actor", "number"),
    Index("ix_audit_entries_action", "action", "number"),
    Index("ix_audit_entries_subject", "subject", "number"),
)
# Hashes of perfect subtrees of the log, so that no proof reads more than a few hundred rows.
audit_nodes = Table(
    "audit_nodes",
    metadata,
    Column("level", Integer, primary_key=True, autoincrement=False),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("hash", LargeBinary(32), nullable=False),
)
audit_checkpoints = Table(
    "audit_checkpoints",
    metadata,
    Column("size", Integer, primary_key=True, autoincrement=False),
    Column("root", LargeBinary(32), nullable=False),
    Column("signed_s", Float, nullable=False),
    Column("note", Text, nullable=False),  # signed by the aggregator
    Column("cosignatures", Text, nullable=False),  # JSON, by helper
)
# Who agreed that a version may be released.
approvals = Table(
    "approvals",
    metadata,
    Column("task", String(64), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("account", String(64), primary_key=True),
    Column("approved_s", Float, nullable=False),
    Column("digest", LargeBinary(32), nullable=False),  # of the parameters that were approved
)
# What devices last said of themselves, as the broker tells it.
presence = Table(
    "presence",
    metadata,
    Column("device", String(64), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("reason", String(16), nullable=False),
    Column("software", String(64), nullable=False),
    Column("since_s", Float, nullable=False),
    Column("seen_s", Float, nullable=False),
)
# How far each webhook has been told what the audit log says.
webhooks = Table(
    "webhooks",
    metadata,
    Column("webhook", String(64), primary_key=True),
    Column("position", Integer, nullable=False),  # number of the entry that it is told of next
    Column("delivered", Integer, nullable=False),
    Column("delivered_s", Float),
    Column("failures", Integer, nullable=False),  # in a row
    Column("failing_s", Float),
    Column("due_s", Float, nullable=False),
    Column("problem", Text, nullable=False),
)
