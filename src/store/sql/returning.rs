//! The statements of databases that return the rows that they change, and that know an `UPDATE ..
//! FROM` and the place of a row.

use super::{
    Statements,
    call::{Dialect, statements},
    single::Singles,
    statements::{PURGE_INTENTS, PURGE_PHASES, PURGE_RECORDS, PURGE_REQUESTS, Purges, Records, Recovery},
};

impl<Own> Statements<Own> {
    /// Makes the statements. `recovery` is the dialect of all but those about records.
    pub(in crate::store) fn new(records: &Dialect, recovery: Dialect, own: Own) -> Self {
        Self {
            records: Records::new(records),
            recovery: Recovery::new(&recovery),
            takes: Takes::new(&recovery),
            purges: Purges::by_place(records, &recovery),
            singles: Singles::new(records),
            own,
            dialect: recovery,
        }
    }
}

statements! {
    /// The statements that take due rows, for databases that return the rows that they change. They
    /// skip locked rows.
    pub(in crate::store) struct Takes by dialect {
        dangling: dialect.returning(
            "WITH due AS (
                 SELECT {i}.id AS place FROM {intents} AS {i}
                 WHERE {i}.look_at <= {now} AND {i}.name {among_names} AND NOT {in_flight}
                 ORDER BY {i}.look_at LIMIT :limit {skip_locked}
             )
             UPDATE {intents} AS {i} SET look_at = {now} + :pause, looks = {i}.looks + 1,
                 takes = {i}.takes + 1
             FROM due WHERE {i}.id = due.place",
            "{intent}"
        ),
        /// Finds the record of each request by its key, and skips it while a handler's transaction
        /// has it locked.
        abandoned: dialect.returning(
            "WITH due AS (
                 SELECT {q}.record_id AS place FROM {requests} AS {q}
                 {join_abandoned_record}
                 WHERE {q}.next_at <= {now}
                 ORDER BY {q}.next_at LIMIT :limit {skip_locked_q}
             )
             UPDATE {requests} AS {q} SET next_at = {now} + :pause, tries = {q}.tries + 1
             FROM due WHERE {q}.record_id = due.place",
            "{request}"
        ),
    }
}

impl Purges {
    /// Makes the purges of databases in which a row has a `{place}`.
    ///
    /// Measured on PostgreSQL with 500,000 records, batches of 1,000: by place 0.9 to 1.4 s for
    /// 100,000, by primary key 2.0 to 3.0 s.
    pub(in crate::store) fn by_place(records: &Dialect, recovery: &Dialect) -> Self {
        Self {
            records: records.statement(PURGE_RECORDS),
            intents: recovery.statement(PURGE_INTENTS),
            phases: recovery.statement(PURGE_PHASES),
            requests: recovery.statement(PURGE_REQUESTS),
        }
    }
}
