//! The statements and fragments of SQLite.

use crate::store::sql::{
    Statements,
    call::{Dialect, statements},
    setup::Identifier,
};

/// Makes the statements.
pub(super) fn statements(prefix: &Identifier) -> Statements<Own> {
    // The name of the database, because a handler may have made a temporary table of that name on
    // the connection that writes.
    let dialect = Dialect::new(None, |table| format!("main.\"{prefix}_{table}\""), FRAGMENTS);
    let own = Own::new(&dialect);
    Statements::new(&dialect.clone(), dialect, own)
}

/// Fragments. Those for row locks are empty: a writer has the whole database.
const FRAGMENTS: &[(&str, &str)] = &[
    ("now", "CAST((julianday('now') - 2440587.5) * 86400000.0 AS INTEGER)"),
    ("or_same_request", "ON CONFLICT (record_id) DO UPDATE SET record_id = excluded.record_id"),
    ("join_abandoned_record", "JOIN {records} AS {r} ON {record_of_request} AND {abandoned}"),
    ("micros(", "("),
    ("micros)", ") * 1000"),
    ("bigint", "bigint"),
    ("among_names", "IN (SELECT value FROM json_each(:names))"),
    ("never", "0"),
    ("far", "9000000000000000"),
    ("place", "rowid"),
    ("where_doomed", "WHERE rowid IN (SELECT place FROM doomed)"),
    ("materialized", "MATERIALIZED"),
    ("for_update", ""),
    ("skip_locked", ""),
    ("skip_locked_q", ""),
];

statements! {
    /// The statements that only SQLite has.
    pub(in crate::store) struct Own by dialect {
        look: dialect.statement(
            "SELECT {record}, {decision} <> 'show' AS open FROM {records} AS {r} WHERE {this_key}"
        ),
        take: dialect.returning(
            "INSERT INTO {records} AS {r} (consumer, key, id, fingerprint, state, attempt, attempt_number,
                 abandoned, max_abandoned, lease_until, created_at, expires_at)
             VALUES (:consumer, :key, :record, :fingerprint, 'in_progress', :attempt, 1, 0, :max_abandoned,
                 {lease_until}, {now}, {now} + :retention)
             ON CONFLICT (consumer, key) DO UPDATE SET {taken} WHERE {decision} <> 'show'",
            "{record}"
        ),
        /// Shows the records that claims of many keys find.
        look_together: dialect.of_rows().with("large", "FALSE").statement(&format!(
            "SELECT {{record}}, {{large}} OR {{decision}} <> 'show' AS open, FALSE AS written
             FROM ({CLAIMS}) AS excluded CROSS JOIN {{records}} AS {{r}} WHERE {{this_key}}"
        )),
        take_together: dialect.of_rows().returning(
            &format!(
                "INSERT INTO {{records}} AS {{r}} (consumer, key, id, fingerprint, state, attempt,
                     attempt_number, abandoned, max_abandoned, lease_until, created_at, expires_at)
                 SELECT consumer, key, id, fingerprint, 'in_progress', attempt, 1, 0, max_abandoned,
                     lease_until, {{now}}, expires_at
                 FROM ({CLAIMS}) WHERE TRUE
                 ON CONFLICT (consumer, key) DO UPDATE SET {{taken}} WHERE {{decision}} <> 'show'"
            ),
            "{record}, TRUE AS written"
        ),
        complete_together: dialect.of_rows().returning(
            "UPDATE {records} AS {r} SET expires_at = {expiry_if_completed}, state = 'completed',
                 response = excluded.response, completed_at = {now}
             FROM (SELECT value ->> 0 AS consumer, value ->> 1 AS key, unhex(value ->> 2) AS attempt,
                       substr(:responses, value ->> 3, value ->> 4) AS response
                   FROM json_each(:attempts)) AS excluded
             WHERE {this_key} AND {mine}",
            "{r}.attempt"
        ),
        release_together: dialect.of_rows().returning(
            "DELETE FROM {records} AS {r} WHERE ({r}.consumer, {r}.key, {r}.attempt) IN (
                 SELECT value ->> 0, value ->> 1, unhex(value ->> 2) FROM json_each(:attempts))
             AND NOT {retained} AND {r}.state IN ('in_progress', 'held')",
            "{r}.attempt"
        ),
        renew: dialect.with("lease", "i.lease").returning(
            "UPDATE {records} AS {r} SET expires_at = {expiry_if_leased}, lease_until = {lease_until}
             FROM (SELECT value ->> 0 AS consumer, value ->> 1 AS key, value ->> 2 AS attempt,
                       ((value ->> 3) + 999) / 1000 AS lease
                   FROM json_each(:renewals)) AS i
             WHERE {r}.consumer = i.consumer AND {r}.key = i.key AND hex({r}.attempt) = i.attempt
                 AND {r}.state = 'in_progress'",
            "{r}.attempt, TRUE AS renewed"
        ),
        still_mine: dialect.statement(
            "SELECT {r}.attempt, FALSE AS renewed
             FROM (SELECT value ->> 0 AS consumer, value ->> 1 AS key, value ->> 2 AS attempt
                   FROM json_each(:renewals)) AS i
             CROSS JOIN {records} AS {r}
             WHERE {r}.consumer = i.consumer AND {r}.key = i.key AND hex({r}.attempt) = i.attempt
                 AND {r}.state IN ('in_progress', 'held')"
        ),
        mine: dialect.statement("SELECT 1 FROM {records} AS {r} WHERE {this_key} AND {mine}"),
        /// Retains the record of a phase, and renews the lease.
        retain: dialect.with("retained", "TRUE").statement(
            "UPDATE {records} AS {r} SET kept = TRUE, expires_at = {expiry_if_leased},
                 lease_until = {lease_until}
             WHERE {this_key} AND {mine} AND {r}.state = 'in_progress'"
        ),
        finish_phase: dialect.statement(
            "INSERT INTO {phases} (record_id, consumer, key, name, attempt, result, finished_at)
             SELECT {r}.id, :consumer, :key, :name, :attempt, :result, {now} FROM {records} AS {r}
             WHERE {this_key} AND {mine}"
        ),
    }
}

/// The records that claims propose.
const CLAIMS: &str = "
    SELECT value ->> 0 AS consumer, value ->> 1 AS key, unhex(value ->> 2) AS attempt,
        unhex(value ->> 3) AS id, unhex(value ->> 4) AS fingerprint, value ->> 5 AS max_abandoned,
        {now} + ((value ->> 6) + 999) / 1000 AS lease_until,
        {now} + ((value ->> 7) + 999) / 1000 AS expires_at
    FROM json_each(:claims)";

#[cfg(test)]
mod tests {
    use sqlx::{AssertSqlSafe, Row, SqlitePool};

    use super::*;
    use crate::store::sql::statements::Recovery;

    #[tokio::test]
    async fn what_operators_and_reconcilers_ask_for_is_found_by_its_index() {
        let pool = SqlitePool::connect("sqlite::memory:").await.unwrap();
        let mut database = pool.acquire().await.unwrap();
        for migration in [
            include_str!("../../../migrations/sqlite/0001_records.sql"),
            include_str!("../../../migrations/sqlite/0002_intents.sql"),
        ] {
            sqlx::raw_sql(migration).execute(&mut *database).await.unwrap();
        }
        let Statements { recovery, takes, .. } = super::statements(&Identifier::default_prefix());
        let Recovery { list_open, list_dangling, list_attention, list_dead, count, .. } = &recovery;
        for (statement, indices) in [
            (&recovery.list_of_record, &["record_id"][..]),
            (&recovery.count_overlooked, &["look_at"]),
            (list_open, &["look_at"]),
            (list_dangling, &["look_at"]),
            (list_attention, &["look_at"]),
            (count, &["look_at"]),
            // The second one is that of the primary key.
            (&takes.dangling, &["look_at", "1"]),
            (list_dead, &["dead"]),
        ] {
            let plan = sqlx::raw_sql(AssertSqlSafe(format!("EXPLAIN QUERY PLAN {}", statement.text)))
                .fetch_all(&mut *database)
                .await
                .unwrap();
            let plan: Vec<String> = plan.iter().map(|row| row.get("detail")).collect();
            let uses = |step: &String, index| step.contains(&format!("idempotency_intents_{index}"));
            assert!(indices.iter().all(|index| plan.iter().any(|step| uses(step, index))), "{plan:#?}");
            let walks = |step: &String| {
                step.contains("idempotency_intents") && !indices.iter().any(|index| uses(step, index))
            };
            assert!(!plan.iter().any(walks), "{plan:#?}");
        }
    }
}
