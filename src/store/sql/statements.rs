//! The statements that all dialects share. Those for databases with `RETURNING` are in
//! [`returning`](super::returning).
//!
//! They use only what every SQL database understands: no `RETURNING`, no `ON CONFLICT`, no `UPDATE
//! .. FROM`. The number of rows of a change tells if it was applied. MySQL evaluates a `SET` from
//! left to right. So an expression that reads an old value stands before the assignment of that
//! column. Names that are reserved words stand in double quotes, which MySQL reads as names only
//! with the SQL mode `ANSI_QUOTES`.

use super::call::{Statement, statements};

statements! {
    /// The statements about records.
    pub(in crate::store) struct Records by dialect {
        complete: dialect.statement(
            "UPDATE {records} AS {r} SET expires_at = {expiry_if_completed}, state = 'completed',
                 response = :response, completed_at = {now}
             WHERE {this_key} AND {mine}"
        ),
        release: dialect.statement(
            "DELETE FROM {records} AS {r} WHERE {this_key} AND {mine} AND NOT {retained}"
        ),
        /// For a record that is retained.
        release_retained: dialect.statement(
            "UPDATE {records} AS {r} SET expires_at = {expiry_if_freed}, state = 'in_progress',
                 attempt = NULL, lease_until = {now}
             WHERE {this_key} AND {mine}"
        ),
        hold: dialect.statement(
            "UPDATE {records} AS {r} SET state = 'held', lease_until = {now} WHERE {this_key} AND {mine}"
        ),
        get: dialect.statement("SELECT {record} FROM {records} AS {r} WHERE {this_key}"),
        /// Filters by the state that is shown, which is not always the one in the row.
        list: dialect.statement(
            "SELECT * FROM (SELECT {record} FROM {records} AS {r}) AS {r}
             WHERE :filter = 'all' OR {r}.state = :filter
             ORDER BY {r}.created_at, {r}.consumer, {r}.key LIMIT :limit"
        ),
        evict: dialect.statement("DELETE FROM {records} AS {r} WHERE {this_key}"),
        resolve_release: dialect.statement(
            "DELETE FROM {records} AS {r} WHERE {this_key} AND {releasable} AND NOT {retained}"
        ),
        /// For a record that is retained.
        resolve_release_retained: dialect.statement(
            "UPDATE {records} AS {r} SET expires_at = {expiry_if_freed}, state = 'in_progress',
                 attempt = NULL, abandoned = 0, lease_until = {now}
             WHERE {this_key} AND {releasable}"
        ),
        resolve_complete: dialect.statement(
            "UPDATE {records} AS {r} SET expires_at = {whole_retention}, state = 'completed',
                 response = :response, attempt = NULL, completed_at = {now}
             WHERE {this_key} AND {resolvable}"
        ),
    }
}

statements! {
    /// The statements about intents, finished phases and kept requests.
    pub(in crate::store) struct Recovery by dialect {
        /// Waits for a transaction that changes the record or its intents. The statements after it
        /// see what was committed until then.
        lock: dialect.statement("SELECT 1 FROM {records} AS {r} WHERE {this_key} {for_update}"),
        /// Calls an intent that exists already.
        call_again: dialect.statement(
            "UPDATE {intents} AS {i} SET
                 repeatable_until = CASE WHEN {may_have_arrived}
                                        AND {i}.repeatable_until <= {repeatable_until}
                                    THEN {i}.repeatable_until ELSE {repeatable_until} END,
                 sent_before      = {may_have_arrived},
                 absent           = CASE {i}.state WHEN 'dead' THEN {i}.sent ELSE {i}.absent END,
                 state            = 'open',
                 sent             = TRUE,
                 arguments        = :arguments,
                 attempt          = :attempt,
                 \"call\"           = :call,
                 calls            = {i}.calls + 1,
                 opened_at        = {now},
                 dangling_at      = {now} + :dangling_after,
                 settled_at       = NULL,
                 reason           = NULL,
                 look_at          = {now} + :dangling_after,
                 looks            = 0,
                 takes            = 0,
                 absences         = 0,
                 attention        = NULL
             WHERE {i}.id = :intent AND {i}.call <> :call AND ({i}.arguments = :arguments OR {never_sent})
                 AND {callable}
                 AND EXISTS (SELECT 1 FROM {records} AS {r} WHERE {owned})"
        ),
        /// Calls an intent for the first time.
        call_first: dialect.statement(
            "INSERT INTO {intents} (id, record_id, consumer, \"key\", name, discriminator, ordinal, arguments,
                 subject, state, sent, sent_before, absent, attempt, \"call\", calls, repeatable_until,
                 created_at, opened_at, dangling_at, look_at, looks, absences)
             SELECT :intent, :record, :consumer, :key, :name, :discriminator, :ordinal, :arguments,
                 :subject, 'open', TRUE, FALSE, FALSE, :attempt, :call, 1, {repeatable_until},
                 {now}, {now}, {now} + :dangling_after, {now} + :dangling_after, 0, 0
             FROM {records} AS {r}
             WHERE {owned} AND NOT EXISTS (SELECT 1 FROM {intents} AS {i} WHERE {i}.id = :intent)"
        ),
        /// Shows the intent that exists, if the record is the attempt's.
        opened: dialect.statement(
            "SELECT {intent} FROM {intents} AS {i} JOIN {records} AS {r} ON {r}.id = {i}.record_id
             WHERE {i}.id = :intent AND {owned}"
        ),
        /// Updates what the record knows about its intents.
        recount: dialect.statement(
            "UPDATE {records} AS {r} SET
                 expires_at       = CASE WHEN {leased} AND {r}.expires_at <= {r}.lease_until
                                    THEN {whole_retention} ELSE {expiry_if_freed} END,
                 kept             = {retained} OR EXISTS (SELECT 1 FROM {intents} AS {i}
                                     WHERE {i}.record_id = {r}.id),
                 unresolved       = (SELECT count(*) FROM {intents} AS {i}
                                     WHERE {i}.record_id = {r}.id AND {i}.state = 'open'),
                 repeatable_until = (SELECT min({i}.repeatable_until) FROM {intents} AS {i}
                                     WHERE {i}.record_id = {r}.id AND {may_have_arrived})
             WHERE {this_record}"
        ),
        get: dialect.statement("SELECT {intent} FROM {intents} AS {i} WHERE {i}.id = :intent"),
        list_open: dialect.statement(&waiting("{i}.state = 'open'")),
        list_dangling: dialect.statement(&waiting("{dangling}")),
        list_attention: dialect.statement(&waiting("{i}.attention IS NOT NULL")),
        list_dead: dialect.statement(
            "SELECT {intent} FROM {intents} AS {i} WHERE {i}.state = 'dead'
             ORDER BY {i}.created_at DESC LIMIT :limit"
        ),
        list_of_record: dialect.statement(
            "SELECT {intent} FROM {intents} AS {i} WHERE {i}.record_id = :record
             ORDER BY {i}.created_at LIMIT :limit"
        ),
        count_overlooked: dialect.statement(
            "WITH i AS {materialized} (
                 SELECT {i}.name FROM {intents} AS {i}
                 WHERE {i}.look_at > {never} AND {i}.look_at <= {now} - :overdue AND {i}.state = 'open'
                     AND NOT {i}.name {among_names} AND NOT {in_flight}
                 ORDER BY {i}.look_at LIMIT :limit
             )
             SELECT {i}.name, CAST(count(*) AS {bigint}) AS intents FROM i
             GROUP BY {i}.name ORDER BY {i}.name"
        ),
        count: dialect.statement(&format!(
            "{WAITING} SELECT count(CASE WHEN {{i}}.state = 'open' THEN 1 END) AS open,
                 count(CASE WHEN {{dangling}} THEN 1 END) AS dangling,
                 count({{i}}.attention) AS need_attention,
                 (SELECT {{age}} FROM i WHERE {{i}}.state = 'open'
                  ORDER BY {{i}}.created_at LIMIT 1) AS oldest
             FROM i"
        )),
        find_phase: dialect.statement(
            "SELECT p.result FROM {phases} AS p WHERE p.record_id = :record AND p.name = :name"
        ),
        keep_request: dialect.statement(
            "INSERT INTO {requests} (record_id, consumer, \"key\", request, tries, next_at)
             SELECT :record, :consumer, :key, :request, 0, {now} + :after FROM {records} AS {r} WHERE {owned}
             {or_same_request}"
        ),
        retain_record: dialect.statement(
            "UPDATE {records} AS {r} SET kept = TRUE WHERE {this_record} AND {r}.state <> 'completed'"
        ),
        /// Records the outcome of a try. A try that was not sent does not count.
        update_request: dialect.statement(
            "UPDATE {requests} AS {q} SET
                 tries     = CASE WHEN :tried OR {q}.tries = 0 THEN {q}.tries ELSE {q}.tries - 1 END,
                 next_at   = CASE WHEN :again THEN {now} + :after END,
                 attention = :attention
             WHERE {q}.record_id = :record AND {q}.tries = :tries AND {q}.next_at IS NOT NULL"
        ),
        /// Records the decision of an operator, in any state.
        reset_request: dialect.statement(
            "UPDATE {requests} AS {q} SET
                 tries     = 0,
                 next_at   = CASE WHEN :again THEN {now} + :after END,
                 attention = :attention
             WHERE {q}.record_id = :record"
        ),
        delete_request: dialect.statement("DELETE FROM {requests} WHERE record_id = :record"),
        list_requests: dialect.statement(
            "SELECT {request} FROM {requests} AS {q} WHERE {q}.next_at IS NULL
             ORDER BY {q}.record_id LIMIT :limit"
        ),
    }
}

/// The intents that a person or a reconciler must look at, as `i`. They are selected before they
/// are sorted: otherwise a planner could walk through all intents in the order of their age to find
/// them.
const WAITING: &str = "WITH i AS {materialized} (SELECT * FROM {intents} WHERE look_at > {never})";

fn waiting(filter: &str) -> String {
    format!("{WAITING} SELECT {{intent}} FROM i WHERE {filter} ORDER BY {{i}}.created_at LIMIT :limit")
}

/// The purges. Each of them skips locked rows.
#[derive(Debug)]
pub(in crate::store) struct Purges {
    pub(in crate::store) records: Statement,
    pub(in crate::store) intents: Statement,
    pub(in crate::store) phases: Statement,
    pub(in crate::store) requests: Statement,
}

/// `IS TRUE` prevents PostgreSQL from finding the rows a second time by their expiry, which would
/// read all rows that are due.
pub(super) const PURGE_RECORDS: &str = "
WITH doomed AS (
    SELECT {r}.{place} AS place FROM {records} AS {r}
    WHERE {r}.expires_at <= {now} AND {purgeable} ORDER BY {r}.expires_at LIMIT :limit {skip_locked}
)
DELETE FROM {records} AS {r} {where_doomed} AND {purgeable} IS TRUE";

/// An intent stays as long as its record, because a retry may ask for it again. An intent that was
/// opened after it was selected stays as well.
pub(super) const PURGE_INTENTS: &str = "
WITH doomed AS (
    SELECT {i}.{place} AS place FROM {intents} AS {i}
    WHERE {i}.created_at <= {now} - :retention AND {i}.look_at IS NULL AND {i}.state <> 'open'
        AND NOT EXISTS (SELECT 1 FROM {records} AS {r} WHERE {record_of_intent})
    ORDER BY {i}.created_at LIMIT :limit {skip_locked}
)
DELETE FROM {intents} {where_doomed} AND look_at IS NULL AND state <> 'open'";

pub(super) const PURGE_PHASES: &str = "
WITH doomed AS (
    SELECT p.{place} AS place FROM {phases} AS p
    WHERE p.finished_at <= {now} - :retention AND NOT EXISTS (
        SELECT 1 FROM {records} AS {r}
        WHERE {r}.consumer = p.consumer AND {r}.key = p.key AND {r}.id = p.record_id)
    ORDER BY p.finished_at LIMIT :limit {skip_locked}
)
DELETE FROM {phases} {where_doomed}";

pub(super) const PURGE_REQUESTS: &str = "
WITH doomed AS (
    SELECT {q}.{place} AS place FROM {requests} AS {q} WHERE NOT EXISTS (
        SELECT 1 FROM {records} AS {r} WHERE {record_of_request} AND {r}.state <> 'completed')
    LIMIT :limit {skip_locked}
)
DELETE FROM {requests} {where_doomed}";
