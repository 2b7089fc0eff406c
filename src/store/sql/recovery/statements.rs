//! The statements of recovery, for every engine.

use std::sync::Arc;

use super::super::RULES;

/// The statements, for the tables of a store.
#[derive(Debug)]
pub(in crate::store) struct Statements {
    pub(super) lock: Arc<str>,
    pub(super) open: Arc<str>,
    pub(super) opened: Arc<str>,
    pub(super) update: Arc<str>,
    pub(super) recount: Arc<str>,
    pub(super) get: Arc<str>,
    pub(in crate::store) take_dangling: Arc<str>,
    pub(in crate::store) list_open: Arc<str>,
    pub(in crate::store) list_dangling: Arc<str>,
    pub(in crate::store) list_attention: Arc<str>,
    pub(in crate::store) list_dead: Arc<str>,
    pub(in crate::store) count: Arc<str>,
    pub(super) find_phase: Arc<str>,
    pub(super) keep_request: Arc<str>,
    pub(super) keep_record: Arc<str>,
    pub(super) take_abandoned: Arc<str>,
    pub(super) update_request: Arc<str>,
    pub(super) delete_request: Arc<str>,
    pub(super) list_requests: Arc<str>,
    pub(super) purge_intents: Arc<str>,
    pub(super) purge_phases: Arc<str>,
    pub(super) purge_requests: Arc<str>,
}

impl Statements {
    /// `table` names a table; `dialect` is what differs: `{now}`, `{far}`, `{place}`, the times, and the locks.
    pub(in crate::store) fn new(table: impl Fn(&str) -> String, dialect: &[(&str, &str)]) -> Self {
        let (records, intents) = (table("records"), table("intents"));
        let (phases, requests) = (table("phases"), table("requests"));
        let render = |template: &str| -> Arc<str> {
            let names = [
                ("{records}", records.as_str()),
                ("{intents}", &intents),
                ("{phases}", &phases),
                ("{requests}", &requests),
                ("{r}", "r"),
                ("{attempt}", "$4"),
            ];
            let rules = INTENT_RULES.iter().chain(RULES).chain(dialect).chain(&names);
            rules.fold(template.to_owned(), |sql, (name, value)| sql.replace(name, value)).into()
        };
        // What a statement returns cannot be named by an alias everywhere.
        let returning = |template: &str, columns: &str, alias: &str| {
            render(&template.replace("{returned}", &render(columns).replace(alias, "")))
        };
        let list = |filter: &str| {
            render(&format!(
                "{WAITING} SELECT {{intent}} FROM i WHERE {filter} ORDER BY i.created_at LIMIT $1"
            ))
        };
        Self {
            lock: render(LOCK),
            open: render(OPEN),
            opened: render(OPENED),
            update: render(UPDATE),
            recount: render(RECOUNT),
            get: render("SELECT {intent} FROM {intents} AS i WHERE i.id = $1"),
            take_dangling: returning(TAKE_DANGLING, "{intent}", "i."),
            list_open: list("i.state = 'open'"),
            list_dangling: list("i.state = 'open' AND i.dangling_at <= {now}"),
            list_attention: list("i.attention IS NOT NULL"),
            list_dead: render(LIST_DEAD),
            count: render(&format!("{WAITING}{COUNT}")),
            find_phase: render("SELECT p.result FROM {phases} AS p WHERE p.record_id = $1 AND p.name = $2"),
            keep_request: render(KEEP_REQUEST),
            keep_record: render(KEEP_RECORD),
            take_abandoned: returning(TAKE_ABANDONED, REQUEST, "q."),
            update_request: render(UPDATE_REQUEST),
            delete_request: render("DELETE FROM {requests} WHERE record_id = $1 RETURNING 1"),
            list_requests: render(&format!(
                "SELECT {REQUEST} FROM {{requests}} AS q WHERE q.next_at IS NULL ORDER BY q.record_id LIMIT $1"
            )),
            purge_intents: render(PURGE_INTENTS),
            purge_phases: render(PURGE_PHASES),
            purge_requests: render(PURGE_REQUESTS),
        }
    }
}

/// Rules that come before those of the records.
const INTENT_RULES: &[(&str, &str)] = &[
    (
        "{intent}",
        "i.id, i.record_id, i.consumer, i.key, i.name, i.discriminator, CAST(i.ordinal AS bigint) AS ordinal, i.arguments,
         i.subject, i.state, i.sent, i.resource_id, i.payload, i.reason, i.absent, i.attempt, i.call,
         CAST(i.calls AS bigint) AS calls, {created_at}, {opened_at}, {settled_at}, {age},
         (i.state = 'open' AND i.dangling_at <= {now}) AS dangling, CAST(i.looks AS bigint) AS looks, CAST(i.takes AS bigint) AS takes,
         CAST(i.absences AS bigint) AS absences, i.attention",
    ),
    // Nothing that may have arrived came before.
    ("{unsent}", "(NOT i.sent OR i.state = 'dead')"),
    (
        "{callable}",
        "(i.state = 'open'
            AND (NOT i.sent OR i.repeatable_until > {now} AND excluded.repeatable_until > {now})
            OR i.state = 'dead' AND i.absent)",
    ),
    // Its record waits for the next attempt.
    (
        "{abandoned}",
        "r.consumer = q.consumer AND r.key = q.key AND r.id = q.record_id
            AND {lapsed} AND NOT {held} AND r.expires_at > {now} AND r.max_abandoned > 1",
    ),
    // Its attempt owns the record and may be calling.
    (
        "{in_flight}",
        "EXISTS (SELECT 1 FROM {records} AS r WHERE r.consumer = i.consumer AND r.key = i.key AND r.id = i.record_id
            AND r.attempt = i.attempt AND r.state = 'in_progress' AND r.lease_until > {now})",
    ),
    (
        "{owned}",
        "r.consumer = $1 AND r.key = $2 AND r.id = $3 AND r.attempt = $4 AND r.state = 'in_progress'
            AND r.lease_until > {now}",
    ),
];

/// Waits for whoever changes the record, or its intents. What comes after sees what was committed until then.
const LOCK: &str = "SELECT 1 FROM {records} AS r WHERE r.consumer = $1 AND r.key = $2 {for_update}";

const OPEN: &str = "
INSERT INTO {intents} AS i (id, record_id, consumer, key, name, discriminator, ordinal, arguments, subject, state, sent,
    sent_before, absent, attempt, call, calls, repeatable_until, created_at, opened_at, dangling_at, look_at, looks, absences)
SELECT $5, $3, $1, $2, $6, $7, $8, $9, $10, 'open', TRUE, FALSE, FALSE, $4, $11, 1,
    CASE WHEN $14 THEN {never} ELSE {now} + $12 END, {now}, {now}, {now} + $13,
    {now} + $13, 0, 0
FROM {records} AS r WHERE {owned}
ON CONFLICT (id) DO UPDATE SET
    state            = 'open',
    sent             = TRUE,
    sent_before      = NOT {unsent},
    absent           = FALSE,
    attempt          = excluded.attempt,
    call             = excluded.call,
    calls            = i.calls + 1,
    repeatable_until = CASE WHEN {unsent} OR excluded.repeatable_until < i.repeatable_until
                       THEN excluded.repeatable_until ELSE i.repeatable_until END,
    opened_at        = excluded.opened_at,
    dangling_at      = excluded.dangling_at,
    settled_at       = NULL,
    reason           = NULL,
    look_at          = excluded.look_at,
    looks            = 0,
    takes            = 0,
    absences         = 0,
    attention        = NULL
WHERE i.call <> excluded.call AND i.arguments = excluded.arguments AND {callable}
RETURNING 1";

/// What is there now, if the record is the attempt's.
const OPENED: &str = "
SELECT {intent} FROM {intents} AS i JOIN {records} AS r ON r.id = i.record_id
WHERE i.id = $5 AND {owned}";

const UPDATE: &str = "
UPDATE {intents} AS i SET
    state       = COALESCE($2, i.state),
    sent        = CASE WHEN $3 THEN i.sent_before ELSE i.sent END,
    absent      = $4 OR (i.absent AND $2 IS NULL),
    settled_at  = CASE WHEN $2 IS NULL THEN i.settled_at ELSE {now} END,
    resource_id = COALESCE($5, i.resource_id),
    payload     = COALESCE($6, i.payload),
    reason      = CASE WHEN $2 IS NULL THEN i.reason ELSE $7 END,
    look_at     = CASE $8 WHEN 'keep' THEN i.look_at WHEN 'after' THEN {now} + $9 WHEN 'attention' THEN {far} END,
    looks       = CASE WHEN $12 = 'operator' AND $8 = 'after' THEN 0 ELSE i.looks END,
    absences    = CASE WHEN $10 < 0 THEN i.absences ELSE $10 END,
    attention   = $11
WHERE i.id = $1 AND ($12 = 'operator' AND i.state <> 'finalized' AND NOT {in_flight}
        AND ($8 <> 'after' OR i.state = 'open' OR i.absent)
    OR $12 = 'attention' AND i.state <> 'open' AND i.attention IS NOT NULL
    OR i.call = $13 AND i.state = $12 AND (i.state = 'open' OR i.absent) AND ($14 < 0 OR i.takes = $14))
RETURNING 1";

const RECOUNT: &str = "
UPDATE {records} AS r SET
    kept             = r.kept OR EXISTS (SELECT 1 FROM {intents} AS i WHERE i.record_id = r.id),
    unresolved       = (SELECT count(*) FROM {intents} AS i WHERE i.record_id = r.id AND i.state = 'open'),
    repeatable_until = (SELECT min(i.repeatable_until) FROM {intents} AS i
                        WHERE i.record_id = r.id AND i.state = 'open' AND i.sent),
    expires_at       = {kept_on}
WHERE r.consumer = $1 AND r.key = $2 AND r.id = $3";

const TAKE_DANGLING: &str = "
WITH due AS (
    SELECT i.{place} AS place FROM {intents} AS i WHERE i.look_at <= {now} AND NOT {in_flight}
    ORDER BY i.look_at LIMIT $1 {skip_locked_i}
)
UPDATE {intents} AS i SET look_at = {now} + $2, looks = i.looks + 1, takes = i.takes + 1
FROM due WHERE i.{place} = due.place
RETURNING {returned}";

/// Those that somebody has to look at, as `i`. Apart from what sorts them, so that no planner walks through all intents in
/// the order of their age to find them.
const WAITING: &str = "WITH i AS MATERIALIZED (SELECT * FROM {intents} WHERE look_at > {never})";

const COUNT: &str = "
SELECT count(*) FILTER (WHERE i.state = 'open') AS open,
    count(*) FILTER (WHERE i.state = 'open' AND i.dangling_at <= {now}) AS dangling,
    count(*) FILTER (WHERE i.attention IS NOT NULL) AS need_attention,
    (SELECT {age} FROM i WHERE i.state = 'open' ORDER BY i.created_at LIMIT 1) AS oldest
FROM i";

const LIST_DEAD: &str =
    "SELECT {intent} FROM {intents} AS i WHERE i.state = 'dead' ORDER BY i.created_at DESC LIMIT $1";

const KEEP_REQUEST: &str = "
INSERT INTO {requests} (record_id, consumer, key, request, tries, next_at)
SELECT $3, $1, $2, $5, 0, {now} + $6 FROM {records} AS r WHERE {owned}
ON CONFLICT (record_id) DO UPDATE SET record_id = excluded.record_id RETURNING 1";

const KEEP_RECORD: &str = "
UPDATE {records} AS r SET kept = TRUE WHERE r.consumer = $1 AND r.key = $2 AND r.id = $3 AND r.state <> 'completed'
RETURNING 1";

/// The record is found by its key for each request, and is skipped while somebody has it locked: a transaction of a handler.
const TAKE_ABANDONED: &str = "
WITH due AS (
    SELECT q.{place} AS place FROM {requests} AS q
    {each} {records} AS r {each_where} {abandoned} {each_end}
    WHERE q.next_at <= {now}
    ORDER BY q.next_at LIMIT $1 {skip_locked_q}
)
UPDATE {requests} AS q SET next_at = {now} + $2, tries = q.tries + 1
FROM due WHERE q.{place} = due.place
RETURNING {returned}";

const UPDATE_REQUEST: &str = "
UPDATE {requests} AS q SET
    tries     = CASE WHEN $5 < 0 THEN 0 WHEN $6 OR q.tries = 0 THEN q.tries ELSE q.tries - 1 END,
    next_at   = CASE WHEN $2 THEN {now} + $3 END,
    attention = $4
WHERE q.record_id = $1 AND ($5 < 0 OR q.tries = $5 AND q.next_at IS NOT NULL) RETURNING 1";

const REQUEST: &str =
    "q.record_id, q.consumer, q.key, q.request, CAST(q.tries AS bigint) AS tries, q.attention";

/// Those of a record that is still there may be asked for again.
const PURGE_INTENTS: &str = "
WITH doomed AS (
    SELECT i.{place} AS place FROM {intents} AS i
    WHERE i.created_at <= {now} - $2 AND i.look_at IS NULL AND i.state <> 'open' AND NOT EXISTS (
        SELECT 1 FROM {records} AS r WHERE r.consumer = i.consumer AND r.key = i.key AND r.id = i.record_id)
    ORDER BY i.created_at LIMIT $1 {skip_locked_i}
)
DELETE FROM {intents} WHERE {place} IN (SELECT place FROM doomed) AND look_at IS NULL AND state <> 'open' RETURNING 1";

const PURGE_PHASES: &str = "
WITH doomed AS (
    SELECT p.{place} AS place FROM {phases} AS p
    WHERE p.finished_at <= {now} - $2 AND NOT EXISTS (
        SELECT 1 FROM {records} AS r WHERE r.consumer = p.consumer AND r.key = p.key AND r.id = p.record_id)
    ORDER BY p.finished_at LIMIT $1 {skip_locked_p}
)
DELETE FROM {phases} WHERE {place} IN (SELECT place FROM doomed) RETURNING 1";

const PURGE_REQUESTS: &str = "
WITH doomed AS (
    SELECT q.{place} AS place FROM {requests} AS q WHERE NOT EXISTS (
        SELECT 1 FROM {records} AS r
        WHERE r.consumer = q.consumer AND r.key = q.key AND r.id = q.record_id AND r.state <> 'completed')
    LIMIT $1 {skip_locked_q}
)
DELETE FROM {requests} WHERE {place} IN (SELECT place FROM doomed) RETURNING 1";
