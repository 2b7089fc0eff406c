//! The statements and fragments of PostgreSQL.
//!
//! A statement that serves many rows, or could, locks them in the order of their identity and skips
//! the locked ones.

use crate::store::sql::{
    Statements,
    call::{Dialect, statements},
    setup::Identifier,
};

/// Makes the statements. `schema` is quoted already if it needs quotes.
pub(super) fn statements(schema: &str, prefix: &Identifier) -> Statements<Own> {
    let records = Dialect::new(Some('$'), |table| format!("{schema}.{prefix}_{table}"), FRAGMENTS);
    // The time after the wait for a lock, not before. In a subquery, because PostgreSQL uses no
    // index for a value that may change from row to row.
    let recovery = records.with("now", "(SELECT clock_timestamp())");
    Statements::new(&records, recovery, Own::new(&records))
}

const FRAGMENTS: &[(&str, &str)] = &[
    ("now", "statement_timestamp()"),
    ("or_same_request", "ON CONFLICT (record_id) DO UPDATE SET record_id = excluded.record_id"),
    (
        "join_abandoned_record",
        "CROSS JOIN LATERAL (SELECT 1 FROM {records} AS {r} WHERE {record_of_request} AND {abandoned}
             LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) AS {r}",
    ),
    ("micros(", "CAST(extract(epoch FROM "),
    ("micros)", ") * 1000000 AS bigint)"),
    ("bigint", "bigint"),
    ("among_names", "= ANY (ARRAY (SELECT json_array_elements_text(:names::json)))"),
    ("never", "'-infinity'"),
    ("far", "'infinity'"),
    ("place", "ctid"),
    // Faster than IN, which first removes duplicates.
    ("where_doomed", "USING doomed WHERE ctid = doomed.place"),
    ("materialized", "MATERIALIZED"),
    ("for_update", "FOR NO KEY UPDATE"),
    ("skip_locked", "FOR UPDATE SKIP LOCKED"),
    // The record that is joined has a weaker lock.
    ("skip_locked_q", "FOR UPDATE OF {q} SKIP LOCKED"),
];

statements! {
    /// The statements that only PostgreSQL has.
    pub(in crate::store) struct Own by dialect {
        /// Adds the key, or shows its record; `open` is true if the record could be taken. No row
        /// comes back if another claim added the key simultaneously.
        ///
        /// The insert is tried only if the snapshot does not show the key. On a key that exists, it
        /// would wait for the transaction that holds the row. A duplicate would then cost a row
        /// lock and a transaction id.
        claim: dialect.statement(
            "WITH found AS (
                 SELECT {record}, {decision} <> 'show' AS open FROM {records} AS {r} WHERE {this_key}
             ), added AS (
                 INSERT INTO {records} AS {r} (consumer, key, id, fingerprint, state, attempt, attempt_number,
                     abandoned, max_abandoned, lease_until, created_at, expires_at)
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
        /// Takes a key that exists. No row comes back if another claim was faster, or is about to
        /// be. The decision is made about the row as it was locked.
        take: dialect.with("decided", "l.decision").statement(
            "WITH locked AS (
                 SELECT {decision} AS decision FROM {records} AS {r}
                 WHERE {this_key} AND {decision} <> 'show'
                 LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED
             )
             UPDATE {records} AS {r} SET {taken}
             FROM locked AS l WHERE {this_key}
             RETURNING {record}"
        ),
        /// Claims many keys. The rows of `i` are the records that the claims propose.
        ///
        /// Inserts only the keys that the snapshot does not show, as `claim` does. Takes keys that
        /// exist by an insert that never inserts: so it finds each row by the index of the key,
        /// whatever the planner knew about the table. The row is locked by then, so it waits for
        /// none, and it decides again about the row as it was locked.
        ///
        /// An insert can wait for the transaction of another that has inserted the key and not
        /// committed yet. The time for which it does is short: then the claims go alone.
        claim_together: dialect.of_rows().statement(
            "WITH i AS (
                 SELECT consumer, key, id, fingerprint, attempt, max_abandoned::smallint AS max_abandoned,
                     {now} + lease * interval '1 microsecond' AS lease_until,
                     {now} + retention * interval '1 microsecond' AS expires_at
                 FROM (SELECT set_config('lock_timeout', '100', true)) AS patience,
                     unnest(:consumers::text[], :keys::text[], :attempts::uuid[], :records::uuid[],
                         :fingerprints::bytea[], :limits::bigint[], :leases::bigint[],
                         :retentions::bigint[])
                     AS i (consumer, key, attempt, id, fingerprint, max_abandoned, lease, retention)
                 ORDER BY consumer COLLATE \"C\", key COLLATE \"C\"
             ), found AS (
                 SELECT {record}, {large} OR {decision} <> 'show' AS open, excluded.attempt AS claimant
                 FROM i AS excluded
                 CROSS JOIN LATERAL (SELECT * FROM {records} AS {r} WHERE {this_key} LIMIT 1) AS {r}
             ), locked AS (
                 SELECT excluded.* FROM i AS excluded CROSS JOIN LATERAL (
                     SELECT FROM {records} AS {r} WHERE {this_key} AND {decision} <> 'show'
                     LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) AS {r}
                 WHERE excluded.attempt = ANY (ARRAY (SELECT claimant FROM found WHERE open))
             ), added AS (
                 INSERT INTO {records} AS {r} (consumer, key, id, fingerprint, state, attempt, attempt_number,
                     abandoned, max_abandoned, lease_until, created_at, expires_at)
                 SELECT consumer, key, id, fingerprint, 'in_progress', attempt, 1, 0, max_abandoned,
                     lease_until, {now}, expires_at
                 FROM i WHERE attempt <> ALL (ARRAY (SELECT claimant FROM found))
                 ORDER BY consumer COLLATE \"C\", key COLLATE \"C\"
                 ON CONFLICT (consumer, key) DO NOTHING
                 RETURNING {record}
             ), took AS (
                 INSERT INTO {records} AS {r} (consumer, key, id, fingerprint, state, attempt, attempt_number,
                     abandoned, max_abandoned, lease_until, created_at, expires_at)
                 SELECT consumer, key, id, fingerprint, 'in_progress', attempt, 1, 0, max_abandoned,
                     lease_until, {now}, expires_at
                 FROM locked
                 ON CONFLICT (consumer, key) DO UPDATE SET {taken} WHERE {decision} <> 'show'
                 RETURNING {record}
             )
             SELECT found.*, FALSE AS written FROM found
             UNION ALL
             SELECT added.*, FALSE AS open, NULL AS claimant, TRUE AS written FROM added
             UNION ALL
             SELECT took.*, FALSE AS open, NULL AS claimant, TRUE AS written FROM took"
        ),
        /// Completes many records. It is written as an insert that never inserts, for the same
        /// reason.
        complete_together: dialect.of_rows().statement(
            "WITH i AS (
                 SELECT * FROM unnest(:consumers::text[], :keys::text[], :attempts::uuid[],
                         :responses::bytea[])
                     AS i (consumer, key, attempt, response)
                 ORDER BY consumer COLLATE \"C\", key COLLATE \"C\"
             ), locked AS (
                 SELECT excluded.* FROM i AS excluded CROSS JOIN LATERAL (
                     SELECT FROM {records} AS {r} WHERE {this_key} AND {mine}
                     LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) AS {r}
             )
             INSERT INTO {records} AS {r} (consumer, key, id, fingerprint, state, attempt, attempt_number,
                 abandoned, max_abandoned, lease_until, created_at, expires_at, response)
             SELECT consumer, key, attempt, '', 'held', attempt, 0, 0, 0, {now}, {now}, {now}, response
             FROM locked
             ON CONFLICT (consumer, key) DO UPDATE SET expires_at = {expiry_if_completed},
                 state = 'completed', response = excluded.response, completed_at = {now}
             WHERE {mine}
             RETURNING {r}.attempt"
        ),
        /// Releases many keys. Finds the rows by `ctid`, for the reason of `renew`: no insert
        /// deletes.
        release_together: dialect.of_rows().statement(
            "WITH i AS (
                 SELECT * FROM unnest(:consumers::text[], :keys::text[], :attempts::uuid[])
                     AS i (consumer, key, attempt)
                 ORDER BY consumer COLLATE \"C\", key COLLATE \"C\"
             ), locked AS (
                 SELECT {r}.place FROM i AS excluded CROSS JOIN LATERAL (
                     SELECT {r}.ctid AS place FROM {records} AS {r}
                     WHERE {this_key} AND NOT {retained} AND {mine}
                     LIMIT 1 FOR UPDATE SKIP LOCKED) AS {r}
             )
             DELETE FROM {records} AS {r} USING locked WHERE {r}.ctid = locked.place
             RETURNING {r}.attempt"
        ),
        /// Finds the rows by `ctid`. In a join by their key, a plan that was made while the table
        /// was small could walk through the whole index.
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
        /// Locks the record of an attempt for its transaction, and restores a setting of the
        /// session. `fresh` is false on a connection that was already in a transaction, with writes
        /// of other code. It is computed before the row is locked, because the lock assigns a
        /// transaction id.
        lock: dialect.statement(
            "SELECT txid_current_if_assigned() IS NULL AS fresh,
                 set_config('enable_seqscan', :enable_seqscan, true)
             FROM {records} AS {r} WHERE {this_key} AND {mine} FOR NO KEY UPDATE OF {r}"
        ),
        /// Renews the lease in the transaction that has the row locked.
        renew_locked: dialect.statement(
            "UPDATE {records} AS {r} SET lease_until = {lease_until}
             WHERE {this_key} AND {mine} AND {r}.state = 'in_progress'"
        ),
        /// Completes the record in the transaction that has the row locked. It is written as an
        /// insert that never inserts: so it finds the row by the index, even if the planner would
        /// prefer a walk through the table. A walk would be slow in a large table. In a small one,
        /// it would collide with every other transaction under SERIALIZABLE.
        complete_locked: dialect.statement(
            "INSERT INTO {records} AS {r} (consumer, key, id, fingerprint, state, attempt_number, abandoned,
                 max_abandoned, lease_until, created_at, expires_at, response)
             VALUES (:consumer, :key, :attempt, '', 'held', 0, 0, 0, {now}, {now}, {now}, :response)
             ON CONFLICT (consumer, key) DO UPDATE SET state = 'completed', response = excluded.response,
                 completed_at = {now}, expires_at = {expiry_if_completed}
             WHERE {mine} AND current_setting('tower_idempotency.attempt', true) = :attempt::text
             RETURNING {r}.state = 'completed' AS completed"
        ),
        /// Records the result of a phase as the last statement of its transaction, which has the
        /// row locked. It also retains the record and renews the lease. It is written as an insert
        /// for the same reason as the completion.
        finish_phase: dialect.with("retained", "TRUE").statement(
            "WITH mine AS (
                 INSERT INTO {records} AS {r} (consumer, key, id, fingerprint, state, attempt_number,
                     abandoned, max_abandoned, lease_until, created_at, expires_at)
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
        /// The name of the table, for the locks of keys.
        table: dialect.statement("{records}"),
        /// Shows how a transaction without a claim has begun, and restores a setting of the
        /// session. `locked` is false if another transaction has the key, and `absent` NULL if the
        /// key has no record.
        look: dialect.statement(
            "SELECT current_setting('tower_idempotency.attempt', true) = :attempt::uuid::text AS locked,
                 pg_backend_pid()::bigint AS backend,
                 (SELECT {absent} FROM {records} AS {r} WHERE {this_key}) AS absent,
                 set_config('enable_seqscan', :enable_seqscan, true)"
        ),
        /// Adds the completed record of such a transaction. `fenced` is false if the handler has
        /// ended the transaction, or reset every setting.
        add_completed: dialect.statement(
            "WITH added AS (
                 INSERT INTO {records} (consumer, key, id, fingerprint, state, attempt, attempt_number,
                     abandoned, max_abandoned, lease_until, created_at, expires_at, completed_at, response)
                 SELECT :consumer, :key, :record, :fingerprint, 'completed', :attempt, 1, 0, :max_abandoned,
                     {now}, {now}, {now} + :retention, {now}, :response
                 WHERE current_setting('tower_idempotency.attempt', true) = :attempt::uuid::text
                 ON CONFLICT (consumer, key) DO NOTHING
                 RETURNING id
             )
             SELECT EXISTS (SELECT FROM added) AS completed,
                 current_setting('tower_idempotency.attempt', true) = :attempt::uuid::text AS fenced"
        ),
        /// Adds the held record of such a transaction.
        add_held: dialect.statement(
            "INSERT INTO {records} (consumer, key, id, fingerprint, state, attempt, attempt_number,
                 abandoned, max_abandoned, lease_until, created_at, expires_at)
             VALUES (:consumer, :key, :record, :fingerprint, 'held', :attempt, 1, 0, :max_abandoned,
                 {now}, {now}, {now} + :retention)
             ON CONFLICT (consumer, key) DO NOTHING
             RETURNING id"
        ),
        try_lock: dialect.statement("SELECT pg_try_advisory_xact_lock(:lock) AS free"),
        /// Ends the backend that has the key, if it is this one.
        terminate_single: dialect.statement(
            "SELECT pg_terminate_backend(a.pid) AS terminated
             FROM pg_locks AS l JOIN pg_stat_activity AS a ON a.pid = l.pid
             WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1 AND l.pid = :backend
                 AND l.classid = ((:lock::bigint >> 32) & 4294967295)::oid
                 AND l.objid = (:lock::bigint & 4294967295)::oid
                 AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
                 AND a.state LIKE :state"
        ),
        /// Ends the backend whose transaction has the record locked.
        terminate: dialect.statement(
            "SELECT pg_terminate_backend(a.pid) AS terminated
             FROM {records} AS {r}
             JOIN pg_locks AS l ON l.locktype = 'transactionid' AND l.granted AND l.transactionid = {r}.xmax
             JOIN pg_stat_activity AS a ON a.pid = l.pid
             WHERE {this_key} AND {r}.attempt = :attempt AND a.state LIKE :state
                 AND a.pid <> pg_backend_pid()"
        ),
    }
}
