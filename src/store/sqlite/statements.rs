//! The statements, in the dialect of SQLite.

use std::{sync::Arc, time::Duration};

use crate::{
    store::sql::{self, Identifier, recovery},
    stored::record::Renewal,
};

/// The statements of a store, for its table.
#[derive(Debug)]
pub(super) struct Statements {
    pub(super) look: Arc<str>,
    pub(super) take: Arc<str>,
    pub(super) renew: Arc<str>,
    pub(super) still_mine: Arc<str>,
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
    pub(super) mine: Arc<str>,
    pub(super) keep: Arc<str>,
    pub(super) finish_phase: Arc<str>,
    pub(super) recovery: recovery::Statements,
}

impl Statements {
    pub(super) fn new(prefix: &Identifier) -> Self {
        let name = format!("\"{prefix}_records\"");
        // A handler may have made a temporary table of that name on the connection that writes.
        let table = format!("main.{name}");
        let phases = format!("main.\"{prefix}_phases\"");
        let render = |template: &str| -> Arc<str> {
            let names = [
                ("{times}", TIMES),
                ("{now}", NOW),
                ("{attempt}", "?3"),
                ("{fingerprint}", "?4"),
                ("{table}", &table),
                ("{phases}", &phases),
                ("{r}", &name),
            ];
            sql::render(template, &names).into()
        };
        Self {
            look: render(LOOK),
            take: render(TAKE),
            renew: render(RENEW),
            still_mine: render(STILL_MINE),
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
            mine: render(MINE),
            keep: render(KEEP),
            finish_phase: render(FINISH_PHASE),
            recovery: recovery::Statements::new(|table| format!("main.\"{prefix}_{table}\""), RECOVERY),
        }
    }
}

/// A duration in milliseconds, rounded up so that a lease is never shorter than asked for.
pub(super) fn millis(duration: Duration) -> i64 {
    sql::micros(duration).saturating_add(999) / 1000
}

/// Renewals as the JSON that the statements over many rows read: consumer, key, attempt in hexadecimal, lease.
pub(super) fn renewals(renewals: &[Renewal]) -> String {
    let row = |renewal: &Renewal| {
        let attempt = &renewal.attempt;
        let id = attempt.id.as_uuid().simple().to_string().to_uppercase();
        serde_json::json!([attempt.consumer.as_str(), attempt.key.as_str(), id, millis(renewal.lease)])
    };
    renewals.iter().map(row).collect::<serde_json::Value>().to_string()
}

const NOW: &str = "CAST((julianday('now') - 2440587.5) * 86400000.0 AS INTEGER)";

const TIMES: &str = "({r}.lease_until - {now}) * 1000 AS lease_left, {r}.created_at * 1000 AS created_at,
    {r}.expires_at * 1000 AS expires_at";

const LOOK: &str =
    "SELECT {columns}, {action} AS action FROM {table} WHERE {r}.consumer = ?1 AND {r}.key = ?2";

const TAKE: &str = "
INSERT INTO {table} (consumer, key, id, fingerprint, state, attempt, attempt_number, abandoned, max_abandoned,
    lease_until, created_at, expires_at)
VALUES (?1, ?2, ?5, ?4, 'in_progress', ?3, 1, 0, ?6, {now} + ?7, {now}, {now} + ?8)
ON CONFLICT (consumer, key) DO UPDATE SET
    id             = CASE {action} WHEN 'anew' THEN excluded.id ELSE {r}.id END,
    fingerprint    = CASE {action} WHEN 'anew' THEN excluded.fingerprint ELSE {r}.fingerprint END,
    state          = CASE {action} WHEN 'hold' THEN 'held' ELSE 'in_progress' END,
    attempt        = CASE {action} WHEN 'hold' THEN {r}.attempt ELSE excluded.attempt END,
    attempt_number = CASE {action} WHEN 'anew' THEN 1 WHEN 'takeover' THEN {r}.attempt_number + 1
                     ELSE {r}.attempt_number END,
    abandoned      = CASE WHEN {action} = 'anew' THEN 0
                     WHEN {action} IN ('takeover', 'hold') THEN {r}.abandoned + ({r}.attempt IS NOT NULL)
                     ELSE {r}.abandoned END,
    max_abandoned  = CASE {action} WHEN 'anew' THEN excluded.max_abandoned ELSE {r}.max_abandoned END,
    lease_until    = CASE {action} WHEN 'hold' THEN {r}.lease_until ELSE excluded.lease_until END,
    created_at     = CASE {action} WHEN 'anew' THEN excluded.created_at ELSE {r}.created_at END,
    expires_at     = CASE {action} WHEN 'anew' THEN excluded.expires_at WHEN 'takeover' THEN
                         CASE WHEN {r}.kept AND {r}.expires_at <= {now} + ?7 THEN {kept_anew} ELSE {r}.expires_at END
                     ELSE {r}.expires_at END,
    kept           = {action} <> 'anew' AND {r}.kept,
    unresolved     = CASE {action} WHEN 'anew' THEN 0 ELSE {r}.unresolved END,
    repeatable_until = CASE {action} WHEN 'anew' THEN NULL ELSE {r}.repeatable_until END,
    completed_at   = NULL,
    response       = NULL
WHERE {action} <> 'none'
RETURNING {columns}";

const RENEW: &str = "
UPDATE {table} SET lease_until = {now} + i.lease,
    expires_at = CASE WHEN {r}.kept AND {r}.expires_at <= {now} + i.lease THEN {kept_anew} ELSE {r}.expires_at END
FROM (SELECT value ->> 0 AS consumer, value ->> 1 AS key, value ->> 2 AS attempt, value ->> 3 AS lease
      FROM json_each(?1)) AS i
WHERE {r}.consumer = i.consumer AND {r}.key = i.key AND hex({r}.attempt) = i.attempt AND {r}.state = 'in_progress'
RETURNING {r}.attempt";

const STILL_MINE: &str = "
SELECT {r}.attempt
FROM (SELECT value ->> 0 AS consumer, value ->> 1 AS key, value ->> 2 AS attempt FROM json_each(?1)) AS i
CROSS JOIN {table}
WHERE {r}.consumer = i.consumer AND {r}.key = i.key AND hex({r}.attempt) = i.attempt
    AND {r}.state IN ('in_progress', 'held')";

const COMPLETE: &str = "
UPDATE {table} SET state = 'completed', response = ?4, completed_at = {now}, expires_at = {answered_on}
WHERE {r}.consumer = ?1 AND {r}.key = ?2 AND {mine}
RETURNING 1";

const RELEASE: &str =
    "DELETE FROM {table} WHERE {r}.consumer = ?1 AND {r}.key = ?2 AND {mine} AND NOT {r}.kept RETURNING 1";

const RELEASE_KEPT: &str = "
UPDATE {table} SET state = 'in_progress', attempt = NULL, lease_until = {now}, expires_at = {kept_on}
WHERE {r}.consumer = ?1 AND {r}.key = ?2 AND {mine}
RETURNING 1";

const HOLD: &str = "
UPDATE {table} SET state = 'held', lease_until = {now}
WHERE {r}.consumer = ?1 AND {r}.key = ?2 AND {mine}
RETURNING 1";

const GET: &str = "SELECT {columns} FROM {table} WHERE {r}.consumer = ?1 AND {r}.key = ?2";

/// The state of a row is what is shown of it, not what is stored.
const LIST: &str = "
SELECT * FROM (SELECT {columns} FROM {table}) AS r
WHERE ?2 = 'all' OR r.state = ?2 ORDER BY r.created_at, r.consumer, r.key LIMIT ?1";

const EVICT: &str = "DELETE FROM {table} WHERE {r}.consumer = ?1 AND {r}.key = ?2 RETURNING 1";

const RESOLVE_RELEASE: &str = "
DELETE FROM {table} WHERE {r}.consumer = ?1 AND {r}.key = ?2 AND {releasable} AND NOT {r}.kept RETURNING 1";

const RESOLVE_RELEASE_KEPT: &str = "
UPDATE {table} SET state = 'in_progress', attempt = NULL, abandoned = 0, lease_until = {now},
    expires_at = {kept_on}
WHERE {r}.consumer = ?1 AND {r}.key = ?2 AND {releasable}
RETURNING 1";

const RESOLVE_COMPLETE: &str = "
UPDATE {table} SET state = 'completed', response = ?3, attempt = NULL, completed_at = {now},
    expires_at = {kept_anew}
WHERE {r}.consumer = ?1 AND {r}.key = ?2 AND {resolvable}
RETURNING 1";

const PURGE: &str = "
DELETE FROM {table} WHERE rowid IN (
    SELECT {r}.rowid FROM {table} WHERE {r}.expires_at <= {now} AND {absent} AND {r}.unresolved = 0 ORDER BY {r}.expires_at LIMIT ?1)
RETURNING 1";

const MINE: &str = "SELECT 1 FROM {table} WHERE {r}.consumer = ?1 AND {r}.key = ?2 AND {mine}";

/// Notes that a phase hangs on the record, and renews the lease.
const KEEP: &str = "
UPDATE {table} SET kept = TRUE, lease_until = {now} + ?4,
    expires_at = CASE WHEN {r}.expires_at <= {now} + ?4 THEN {kept_anew} ELSE {r}.expires_at END
WHERE {r}.consumer = ?1 AND {r}.key = ?2 AND {mine} AND {r}.state = 'in_progress'
RETURNING 1";

const FINISH_PHASE: &str = "
INSERT INTO {phases} (record_id, consumer, key, name, attempt, result, finished_at)
SELECT {r}.id, ?1, ?2, ?4, ?3, ?5, {now} FROM {table} WHERE {r}.consumer = ?1 AND {r}.key = ?2 AND {mine}";

/// What recovery says in the dialect of SQLite.
const RECOVERY: &[(&str, &str)] = &[
    ("{each}", "JOIN"),
    ("{each_where}", "ON"),
    ("{each_end}", ""),
    ("{created_at}", "i.created_at * 1000 AS created_at"),
    ("{opened_at}", "i.opened_at * 1000 AS opened_at"),
    ("{settled_at}", "i.settled_at * 1000 AS settled_at"),
    ("{age}", "({now} - i.created_at) * 1000 AS age"),
    ("{now}", NOW),
    ("{never}", "0"),
    ("{far}", "9000000000000000"),
    ("{place}", "rowid"),
    ("{for_update}", ""),
    ("{skip_locked_i}", ""),
    ("{skip_locked_p}", ""),
    ("{skip_locked_q}", ""),
];
