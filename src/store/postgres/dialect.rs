//! What PostgreSQL says in its own words.
//!
//! A statement that serves many rows, or could, locks them in the order of their identity and skips
//! the locked ones.

use crate::store::sql::{
    self,
    call::{Dialect, statements},
    setup::Identifier,
    statements::{Purges, Records, Recovery, Takes},
};

/// Every statement of a store, for its tables.
#[derive(Debug)]
pub(super) struct Statements {
    pub(super) shared: sql::Statements,
    pub(super) takes: Takes,
    pub(super) own: Own,
}

impl Statements {
    /// `schema` is quoted where it needs to be.
    pub(super) fn new(schema: &str, prefix: &Identifier) -> Self {
        let table = |table: &str| format!("{schema}.{prefix}_{table}");
        let records = Dialect::new('$', table, FRAGMENTS);
        // After a lock was waited for, and not before; in a subquery, because an index is not asked
        // for what changes from row to row.
        let recovery = records.with("now", "(SELECT clock_timestamp())");
        Self {
            takes: Takes::new(&recovery),
            own: Own::new(&records),
            shared: sql::Statements {
                records: Records::new(&records),
                purges: Purges::by_place(&records, &recovery),
                recovery: Recovery::new(&recovery),
                dialect: recovery,
            },
        }
    }
}

const FRAGMENTS: &[(&str, &str)] = &[
    ("now", "statement_timestamp()"),
    ("delete_record", "DELETE FROM {records} AS {r}"),
    ("or_touch_record_id", "ON CONFLICT (record_id) DO UPDATE SET record_id = excluded.record_id"),
    ("each", "CROSS JOIN LATERAL (SELECT 1 FROM"),
    ("each_where", "WHERE"),
    ("each_end", "LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) AS {r}"),
    ("micros(", "CAST(extract(epoch FROM "),
    (")", ") * 1000000 AS bigint)"),
    ("bigint", "bigint"),
    ("never", "'-infinity'"),
    ("far", "'infinity'"),
    ("place", "ctid"),
    // Faster than IN, which first sorts out duplicates.
    ("where_doomed", "USING doomed WHERE ctid = doomed.place"),
    ("materialized", "MATERIALIZED"),
    ("for_update", "FOR NO KEY UPDATE"),
    ("skip_locked_r", "FOR UPDATE SKIP LOCKED"),
    ("skip_locked_i", "FOR UPDATE OF {i} SKIP LOCKED"),
    ("skip_locked_p", "FOR UPDATE OF p SKIP LOCKED"),
    ("skip_locked_q", "FOR UPDATE OF {q} SKIP LOCKED"),
];

statements! {
    /// Those in the words of PostgreSQL alone.
    pub(super) struct Own by dialect {
        /// Adds the key, or shows what is there; `open` is true if it could be taken. No row comes
        /// back if another claim added the key at the same moment.
        ///
        /// The insert is tried only if the snapshot does not show the key: on one that is there it
        /// would wait for the holder of the row, and a duplicate would cost a row lock and a
        /// transaction id.
        claim: dialect.statement(
            "WITH found AS (
                 SELECT {record}, {decision} <> 'show' AS open FROM {records} AS {r} WHERE {this_key}
             ), added AS (
                 INSERT INTO {records} AS {r} (consumer, key, id, fingerprint, state, attempt, attempt_number, abandoned,
                     max_abandoned, lease_until, created_at, expires_at)
                 SELECT :consumer, :key, :record, :fingerprint, 'in_progress', :attempt, 1, 0, :max_abandoned,
                     {lease_until}, {now}, {now} + :retention
                 WHERE NOT EXISTS (SELECT FROM found)
                 ON CONFLICT (consumer, key) DO NOTHING
                 RETURNING {record}
             )
             SELECT added.*, FALSE AS open, TRUE AS written FROM added
             UNION ALL
             SELECT found.*, FALSE AS written FROM found"
        ),
        /// Takes a key that is there. No row comes back if another claim was faster, or is about to
        /// be. What was decided is decided about the row as it was locked.
        take: dialect.with("decided", "l.decision").statement(
            "WITH locked AS (
                 SELECT {r}.consumer, {r}.key, {decision} AS decision FROM {records} AS {r}
                 WHERE {this_key} AND {decision} <> 'show'
                 LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED
             )
             UPDATE {records} AS {r} SET {taken}
             FROM locked AS l WHERE {r}.consumer = l.consumer AND {r}.key = l.key
             RETURNING {record}"
        ),
        /// By `ctid`: joined by their key, the rows could be found by a walk through the index, if
        /// the plan was made while the table was small.
        renew: dialect.with("lease", "l.lease").statement(
            "WITH i AS (
                 SELECT value ->> 0 AS consumer, value ->> 1 AS key, (value ->> 2)::uuid AS attempt,
                     (value ->> 3)::bigint * interval '1 microsecond' AS lease
                 FROM json_array_elements(:renewals::json)
                 ORDER BY consumer, key
             ), seen AS (
                 SELECT i.attempt FROM i CROSS JOIN LATERAL (
                     SELECT FROM {records} AS {r}
                     WHERE {r}.consumer = i.consumer AND {r}.key = i.key AND {r}.attempt = i.attempt
                         AND {r}.state IN ('in_progress', 'held')
                     LIMIT 1) AS {r}
             ), locked AS (
                 SELECT i.attempt, i.lease, {r}.place FROM i CROSS JOIN LATERAL (
                     SELECT {r}.ctid AS place FROM {records} AS {r}
                     WHERE {r}.consumer = i.consumer AND {r}.key = i.key AND {r}.attempt = i.attempt
                         AND {r}.state = 'in_progress'
                     LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) AS {r}
             ), renewed AS (
                 UPDATE {records} AS {r} SET expires_at = {expiry_if_leased}, lease_until = {lease_until}
                 FROM locked AS l WHERE {r}.ctid = l.place
                 RETURNING l.attempt
             )
             SELECT attempt, FALSE AS renewed FROM seen
             UNION ALL
             SELECT attempt, TRUE AS renewed FROM renewed"
        ),
        /// Locks the record of an attempt for its transaction, and puts a setting of the session
        /// back. `fresh` is false on a connection that was in a transaction already, with writes of
        /// other code. It is computed before the row is locked, because the lock itself assigns an
        /// id.
        lock: dialect.statement(
            "SELECT txid_current_if_assigned() IS NULL AS fresh, set_config('enable_seqscan', :enable_seqscan, true)
             FROM {records} AS {r} WHERE {this_key} AND {mine} FOR NO KEY UPDATE OF {r}"
        ),
        /// Renews the lease in the transaction that has the row locked.
        renew_locked: dialect.statement(
            "UPDATE {records} AS {r} SET lease_until = {lease_until}
             WHERE {this_key} AND {mine} AND {r}.state = 'in_progress'"
        ),
        /// Completes inside of the transaction that has the row locked. Written as the insert that
        /// it never becomes, it finds the row by the index, whatever the planner thinks of the
        /// table; a walk through it would take long in a large one, and in a small one collide with
        /// every other transaction under SERIALIZABLE.
        complete_locked: dialect.statement(
            "INSERT INTO {records} AS {r} (consumer, key, id, fingerprint, state, attempt_number, abandoned,
                 max_abandoned, lease_until, created_at, expires_at, response)
             VALUES (:consumer, :key, :attempt, '', 'held', 0, 0, 0, {now}, {now}, {now}, :response)
             ON CONFLICT (consumer, key) DO UPDATE SET state = 'completed', response = excluded.response,
                 completed_at = {now}, expires_at = {expiry_if_completed}
             WHERE {mine} AND current_setting('tower_idempotency.attempt', true) = :attempt::text
             RETURNING {r}.state = 'completed' AS completed"
        ),
        /// Records the result of a phase as the last statement of its transaction, in which the row
        /// is locked, retains the record and renews the lease. Written as an insert for the same
        /// reason as the completion.
        finish_phase: dialect.with("retained", "TRUE").statement(
            "WITH mine AS (
                 INSERT INTO {records} AS {r} (consumer, key, id, fingerprint, state, attempt_number, abandoned,
                     max_abandoned, lease_until, created_at, expires_at)
                 VALUES (:consumer, :key, :attempt, '', 'held', 0, 0, 0, {now}, {now}, {now})
                 ON CONFLICT (consumer, key) DO UPDATE SET kept = TRUE, lease_until = {lease_until},
                     expires_at = {expiry_if_leased}
                 WHERE {mine} AND {r}.state = 'in_progress'
                     AND current_setting('tower_idempotency.attempt', true) = :attempt::text
                 RETURNING {r}.id
             )
             INSERT INTO {phases} (record_id, consumer, key, name, attempt, result, finished_at)
             SELECT mine.id, :consumer, :key, :name, :attempt, :result, {now} FROM mine
             RETURNING TRUE AS completed"
        ),
        /// Ends the backend whose transaction has the record locked.
        terminate: dialect.statement(
            "SELECT pg_terminate_backend(a.pid) AS terminated
             FROM {records} AS {r}
             JOIN pg_locks AS l ON l.locktype = 'transactionid' AND l.granted AND l.transactionid = {r}.xmax
             JOIN pg_stat_activity AS a ON a.pid = l.pid
             WHERE {this_key} AND {r}.attempt = :attempt AND a.state LIKE :state AND a.pid <> pg_backend_pid()"
        ),
    }
}
