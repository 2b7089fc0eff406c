//! The statements, in the dialect of PostgreSQL.
//!
//! A statement that serves many rows, or could, locks them in the order of their identity and skips the locked ones.
//! Rows that it has locked are changed by their `ctid`: no plan can turn that into a walk over the table, and a row
//! that has changed since the statement's snapshot is not found and so left alone.

use std::sync::Arc;

use crate::store::sql::{self, Identifier, recovery};

/// The statements of a store, for its table.
#[derive(Debug)]
pub(super) struct Statements {
    pub(super) claim: Arc<str>,
    pub(super) take: Arc<str>,
    pub(super) renew: Arc<str>,
    pub(super) complete: Arc<str>,
    pub(super) release: Arc<str>,
    pub(super) release_kept: Arc<str>,
    pub(super) hold: Arc<str>,
    pub(super) get: Arc<str>,
    pub(super) evict: Arc<str>,
    pub(super) resolve_release: Arc<str>,
    pub(super) resolve_release_kept: Arc<str>,
    pub(super) resolve_complete: Arc<str>,
    pub(super) purge: Arc<str>,
    pub(super) list: Arc<str>,
    pub(super) lock: Arc<str>,
    pub(super) renew_locked: Arc<str>,
    pub(super) complete_locked: Arc<str>,
    pub(super) terminate: Arc<str>,
    pub(super) finish_phase: Arc<str>,
    pub(super) recovery: recovery::Statements,
}

impl Statements {
    /// `schema` is quoted where it needs to be.
    pub(super) fn new(schema: &str, prefix: &Identifier) -> Self {
        let name = |table: &str| format!("{schema}.{prefix}_{table}");
        let (table, phases) = (name("records"), name("phases"));
        let render = |template: &str| -> Arc<str> {
            let names = [
                ("{times}", TIMES),
                ("{lease_until}", "({now} + $7::bigint * interval '1 microsecond')"),
                ("{expires_at}", "({now} + $8::bigint * interval '1 microsecond')"),
                ("{now}", "statement_timestamp()"),
                ("{attempt}", "$3"),
                ("{fingerprint}", "$4"),
                ("{table}", &table),
                ("{phases}", &phases),
                ("{r}", "r"),
            ];
            sql::render(template, &names).into()
        };
        Self {
            claim: render(CLAIM),
            take: render(TAKE),
            renew: render(RENEW),
            complete: render(COMPLETE),
            release: render(RELEASE),
            release_kept: render(RELEASE_KEPT),
            hold: render(HOLD),
            get: render(GET),
            evict: render(EVICT),
            resolve_release: render(RESOLVE_RELEASE),
            resolve_release_kept: render(RESOLVE_RELEASE_KEPT),
            resolve_complete: render(RESOLVE_COMPLETE),
            purge: render(PURGE),
            list: render(LIST),
            lock: render(LOCK),
            renew_locked: render(RENEW_LOCKED),
            complete_locked: render(COMPLETE_LOCKED),
            terminate: render(TERMINATE),
            finish_phase: render(FINISH_PHASE),
            recovery: recovery::Statements::new(name, RECOVERY),
        }
    }
}

const TIMES: &str = "CAST(extract(epoch FROM r.lease_until - {now}) * 1000000 AS bigint) AS lease_left,
    CAST(extract(epoch FROM r.created_at) * 1000000 AS bigint) AS created_at,
    CAST(extract(epoch FROM r.expires_at) * 1000000 AS bigint) AS expires_at";

/// Adds the key, or shows what is there; `open` is true if it could be taken. No row comes back if another claim added the
/// key at the same moment.
///
/// The insert is tried only if the snapshot does not show the key: on one that is there it would wait for whoever holds
/// the row, and a duplicate would cost a row lock and a transaction id.
const CLAIM: &str = "
WITH found AS (
    SELECT {columns}, {action} <> 'none' AS open FROM {table} AS r WHERE r.consumer = $1 AND r.key = $2
), added AS (
    INSERT INTO {table} AS r (consumer, key, id, fingerprint, state, attempt, attempt_number, abandoned, max_abandoned,
        lease_until, created_at, expires_at)
    SELECT $1, $2, $5, $4, 'in_progress', $3, 1, 0, $6::smallint, {lease_until}, {now}, {expires_at}
    WHERE NOT EXISTS (SELECT FROM found)
    ON CONFLICT (consumer, key) DO NOTHING
    RETURNING {columns}
)
SELECT added.*, FALSE AS open, TRUE AS written FROM added
UNION ALL
SELECT found.*, FALSE AS written FROM found";

/// Takes a key that is there. No row comes back if another claim was faster, or is about to be.
const TAKE: &str = "
WITH locked AS (
    SELECT r.ctid AS place, {action} AS action FROM {table} AS r
    WHERE r.consumer = $1 AND r.key = $2 AND {action} <> 'none'
    LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE {table} AS r SET
    id             = CASE l.action WHEN 'anew' THEN $5 ELSE r.id END,
    fingerprint    = CASE l.action WHEN 'anew' THEN $4 ELSE r.fingerprint END,
    state          = CASE l.action WHEN 'hold' THEN 'held' ELSE 'in_progress' END,
    attempt        = CASE l.action WHEN 'hold' THEN r.attempt ELSE $3 END,
    attempt_number = CASE l.action WHEN 'anew' THEN 1 WHEN 'takeover' THEN r.attempt_number + 1
                     ELSE r.attempt_number END,
    abandoned      = CASE WHEN l.action = 'anew' THEN 0
                     WHEN l.action IN ('takeover', 'hold') THEN r.abandoned + (r.attempt IS NOT NULL)::int
                     ELSE r.abandoned END,
    max_abandoned  = CASE l.action WHEN 'anew' THEN $6::smallint ELSE r.max_abandoned END,
    lease_until    = CASE l.action WHEN 'hold' THEN r.lease_until ELSE {lease_until} END,
    created_at     = CASE l.action WHEN 'anew' THEN {now} ELSE r.created_at END,
    expires_at     = CASE l.action WHEN 'anew' THEN {expires_at} WHEN 'takeover' THEN
                         CASE WHEN r.kept AND r.expires_at <= {lease_until} THEN {kept_anew} ELSE r.expires_at END
                     ELSE r.expires_at END,
    kept           = l.action <> 'anew' AND r.kept,
    unresolved     = CASE l.action WHEN 'anew' THEN 0 ELSE r.unresolved END,
    repeatable_until = CASE l.action WHEN 'anew' THEN NULL ELSE r.repeatable_until END,
    completed_at   = NULL,
    response       = NULL
FROM locked AS l WHERE r.ctid = l.place
RETURNING {columns}";

const RENEW: &str = "
WITH i AS (
    SELECT i.* FROM unnest($1::text[], $2::text[], $3::uuid[], $4::bigint[])
        WITH ORDINALITY AS i (consumer, key, attempt, lease, position)
    ORDER BY consumer, key
), seen AS (
    SELECT i.position FROM i CROSS JOIN LATERAL (
        SELECT FROM {table} AS r
        WHERE r.consumer = i.consumer AND r.key = i.key AND r.attempt = i.attempt
            AND r.state IN ('in_progress', 'held')
        LIMIT 1) AS r
), locked AS (
    SELECT i.position, i.lease, r.place FROM i CROSS JOIN LATERAL (
        SELECT r.ctid AS place FROM {table} AS r
        WHERE r.consumer = i.consumer AND r.key = i.key AND r.attempt = i.attempt AND r.state = 'in_progress'
        LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) AS r
), renewed AS (
    UPDATE {table} AS r SET lease_until = {now} + l.lease * interval '1 microsecond',
        expires_at = CASE WHEN r.kept AND r.expires_at <= {now} + l.lease * interval '1 microsecond' THEN {kept_anew}
                     ELSE r.expires_at END
    FROM locked AS l WHERE r.ctid = l.place
    RETURNING l.position
)
SELECT position, FALSE AS renewed FROM seen
UNION ALL
SELECT position, TRUE AS renewed FROM renewed";

const COMPLETE: &str = "
UPDATE {table} AS r SET state = 'completed', response = $4, completed_at = {now}, expires_at = {answered_on}
WHERE r.consumer = $1 AND r.key = $2 AND {mine}
RETURNING 1";

const RELEASE: &str =
    "DELETE FROM {table} AS r WHERE r.consumer = $1 AND r.key = $2 AND {mine} AND NOT r.kept RETURNING 1";

const RELEASE_KEPT: &str = "
UPDATE {table} AS r SET state = 'in_progress', attempt = NULL, lease_until = {now}, expires_at = {kept_on}
WHERE r.consumer = $1 AND r.key = $2 AND {mine}
RETURNING 1";

const HOLD: &str = "
UPDATE {table} AS r SET state = 'held', lease_until = {now}
WHERE r.consumer = $1 AND r.key = $2 AND {mine}
RETURNING 1";

const GET: &str = "SELECT {columns} FROM {table} AS r WHERE r.consumer = $1 AND r.key = $2";

/// The state of a row is what is shown of it, not what is stored.
const LIST: &str = "
SELECT * FROM (SELECT {columns} FROM {table} AS r) AS r
WHERE $2 = 'all' OR r.state = $2 ORDER BY r.created_at, r.consumer, r.key LIMIT $1";

const EVICT: &str = "DELETE FROM {table} AS r WHERE r.consumer = $1 AND r.key = $2 RETURNING 1";

const RESOLVE_RELEASE: &str = "
DELETE FROM {table} AS r WHERE r.consumer = $1 AND r.key = $2 AND {releasable} AND NOT r.kept RETURNING 1";

const RESOLVE_RELEASE_KEPT: &str = "
UPDATE {table} AS r SET state = 'in_progress', attempt = NULL, abandoned = 0, lease_until = {now},
    expires_at = {kept_on}
WHERE r.consumer = $1 AND r.key = $2 AND {releasable}
RETURNING 1";

const RESOLVE_COMPLETE: &str = "
UPDATE {table} AS r SET state = 'completed', response = $3, attempt = NULL, completed_at = {now},
    expires_at = {now} + (r.expires_at - r.created_at)
WHERE r.consumer = $1 AND r.key = $2 AND {resolvable}
RETURNING 1";

/// `IS TRUE` keeps the planner from looking the rows up a second time by their expiry, all that are due.
const PURGE: &str = "
WITH doomed AS (
    SELECT r.ctid AS place FROM {table} AS r
    WHERE r.expires_at <= {now} AND {absent} AND r.unresolved = 0
    ORDER BY r.expires_at LIMIT $1 FOR UPDATE SKIP LOCKED
)
DELETE FROM {table} AS r USING doomed WHERE r.ctid = doomed.place AND ({absent} AND r.unresolved = 0) IS TRUE RETURNING 1";

/// Locks the record of an attempt for its transaction, and puts a setting of the session back. `fresh` is false on a
/// connection that was in a transaction already, with writes of somebody else; it is computed before the row is locked.
const LOCK: &str = "
SELECT txid_current_if_assigned() IS NULL AS fresh, set_config('enable_seqscan', $4, true)
FROM {table} AS r WHERE r.consumer = $1 AND r.key = $2 AND {mine} FOR NO KEY UPDATE OF r";

/// Gives the attempt its lease anew, in the transaction that has the row locked.
const RENEW_LOCKED: &str = "
UPDATE {table} AS r SET lease_until = {now} + $4::bigint * interval '1 microsecond'
WHERE r.consumer = $1 AND r.key = $2 AND {mine} AND r.state = 'in_progress'";

/// The completion inside of the transaction that has the row locked. Written as the insert that it never becomes, it finds
/// the row by the index, whatever the planner thinks of the table; a walk through it would take long in a large one, and
/// in a small one collide with every other transaction under SERIALIZABLE.
const COMPLETE_LOCKED: &str = "
INSERT INTO {table} AS r (consumer, key, id, fingerprint, state, attempt_number, abandoned, max_abandoned, lease_until,
    created_at, expires_at, response)
VALUES ($1, $2, $3, '', 'held', 0, 0, 0, {now}, {now}, {now}, $4)
ON CONFLICT (consumer, key) DO UPDATE SET state = 'completed', response = excluded.response, completed_at = {now},
    expires_at = {answered_on}
WHERE {mine} AND current_setting('tower_idempotency.attempt', true) = $3::text
RETURNING r.state = 'completed' AS completed";

/// Records the result of a phase as the last statement of its transaction, in which the row is locked, and renews the
/// lease. Written as an insert for the same reason as the completion.
const FINISH_PHASE: &str = "
WITH mine AS (
    INSERT INTO {table} AS r (consumer, key, id, fingerprint, state, attempt_number, abandoned, max_abandoned, lease_until,
        created_at, expires_at)
    VALUES ($1, $2, $3, '', 'held', 0, 0, 0, {now}, {now}, {now})
    ON CONFLICT (consumer, key) DO UPDATE SET kept = TRUE, lease_until = {now} + $6::bigint * interval '1 microsecond'
    WHERE {mine} AND r.state = 'in_progress' AND current_setting('tower_idempotency.attempt', true) = $3::text
    RETURNING r.id
)
INSERT INTO {phases} (record_id, consumer, key, name, attempt, result, finished_at)
SELECT mine.id, $1, $2, $4, $3, $5, {now} FROM mine
RETURNING TRUE AS completed";

/// What recovery says in the dialect of PostgreSQL.
const RECOVERY: &[(&str, &str)] = &[
    ("{each}", "CROSS JOIN LATERAL (SELECT 1 FROM"),
    ("{each_where}", "WHERE"),
    ("{each_end}", "LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) AS r"),
    ("{created_at}", "CAST(extract(epoch FROM i.created_at) * 1000000 AS bigint) AS created_at"),
    ("{opened_at}", "CAST(extract(epoch FROM i.opened_at) * 1000000 AS bigint) AS opened_at"),
    ("{settled_at}", "CAST(extract(epoch FROM i.settled_at) * 1000000 AS bigint) AS settled_at"),
    ("{age}", "CAST(extract(epoch FROM {now} - i.created_at) * 1000000 AS bigint) AS age"),
    // After a lock was waited for, and not before; in a subquery, because an index is not asked for what changes from row
    // to row.
    ("{now}", "(SELECT clock_timestamp())"),
    ("{never}", "'-infinity'"),
    ("{far}", "'infinity'"),
    ("{place}", "ctid"),
    ("{for_update}", "FOR NO KEY UPDATE"),
    ("{skip_locked_i}", "FOR UPDATE OF i SKIP LOCKED"),
    ("{skip_locked_p}", "FOR UPDATE OF p SKIP LOCKED"),
    ("{skip_locked_q}", "FOR UPDATE OF q SKIP LOCKED"),
];

/// Ends the backend whose transaction has the record locked.
const TERMINATE: &str = "
SELECT pg_terminate_backend(a.pid) AS terminated
FROM {table} AS r
JOIN pg_locks AS l ON l.locktype = 'transactionid' AND l.granted AND l.transactionid = r.xmax
JOIN pg_stat_activity AS a ON a.pid = l.pid
WHERE r.consumer = $1 AND r.key = $2 AND r.attempt = $3 AND a.state LIKE $4 AND a.pid <> pg_backend_pid()";
