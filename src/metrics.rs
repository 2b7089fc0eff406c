//! Counters and gauges of the background tasks. Without the feature `metrics`, every function here
//! does nothing.
//!
//! The page `guide::operating` lists names and labels. They are part of the public API.

use std::time::Duration;

#[cfg(feature = "metrics")]
mod names {
    pub(super) const LOOKUPS: &str = "idempotency_intent_lookups_total";
    pub(super) const TURNED_UP: &str = "idempotency_intents_turned_up_total";
    pub(super) const OPEN: &str = "idempotency_intents_open";
    pub(super) const DANGLING: &str = "idempotency_intents_dangling";
    pub(super) const NEED_ATTENTION: &str = "idempotency_intents_need_attention";
    pub(super) const OLDEST: &str = "idempotency_intents_oldest_seconds";
    pub(super) const OVERLOOKED: &str = "idempotency_intents_overlooked";
    pub(super) const SENT_AGAIN: &str = "idempotency_requests_sent_again_total";
    pub(super) const PURGED: &str = "idempotency_purged_total";
    #[cfg(any(feature = "sqlite", feature = "postgres"))]
    pub(super) const GROUP: &str = "idempotency_group_size";
}

/// `true` with the feature `metrics`: then the queries that fill gauges are worth their cost.
pub(crate) const ENABLED: bool = cfg!(feature = "metrics");

/// The kind of rows that the reaper deletes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Purged {
    Records,
    Settled,
}

/// Counts a look-up of an intent by its outcome.
pub(crate) fn looked_up(outcome: &'static str) {
    #[cfg(feature = "metrics")]
    metrics::counter!(names::LOOKUPS, "outcome" => outcome).increment(1);
    #[cfg(not(feature = "metrics"))]
    let _ = outcome;
}

/// Counts a try to complete an abandoned request by its outcome.
pub(crate) fn sent_again(outcome: &'static str) {
    #[cfg(feature = "metrics")]
    metrics::counter!(names::SENT_AGAIN, "outcome" => outcome).increment(1);
    #[cfg(not(feature = "metrics"))]
    let _ = outcome;
}

/// Counts a resource that was found after its intent had been declared absent.
pub(crate) fn turned_up() {
    #[cfg(feature = "metrics")]
    metrics::counter!(names::TURNED_UP).increment(1);
}

/// Sets the gauges of intents.
pub(crate) fn intents(open: u64, dangling: u64, need_attention: u64, oldest: Duration) {
    #[cfg(feature = "metrics")]
    {
        metrics::gauge!(names::OPEN).set(float(open));
        metrics::gauge!(names::DANGLING).set(float(dangling));
        metrics::gauge!(names::NEED_ATTENTION).set(float(need_attention));
        metrics::gauge!(names::OLDEST).set(oldest.as_secs_f64());
    }
    #[cfg(not(feature = "metrics"))]
    let _ = (open, dangling, need_attention, oldest);
}

/// Sets the gauge of overdue intents that no reconciler of this process looks up.
pub(crate) fn overlooked(intents: u64) {
    #[cfg(feature = "metrics")]
    metrics::gauge!(names::OVERLOOKED).set(float(intents));
    #[cfg(not(feature = "metrics"))]
    let _ = intents;
}

/// Records the number of calls that shared a statement.
#[cfg(any(feature = "sqlite", feature = "postgres"))]
pub(crate) fn group(statement: &'static str, calls: usize) {
    #[cfg(feature = "metrics")]
    metrics::histogram!(names::GROUP, "statement" => statement).record(float(calls as u64));
    #[cfg(not(feature = "metrics"))]
    let _ = (statement, calls);
}

/// Counts deleted rows.
pub(crate) fn purged(what: Purged, rows: u64) {
    #[cfg(feature = "metrics")]
    {
        let what = match what {
            Purged::Records => "records",
            Purged::Settled => "settled",
        };
        metrics::counter!(names::PURGED, "what" => what).increment(rows);
    }
    #[cfg(not(feature = "metrics"))]
    let _ = (what, rows);
}

#[cfg(feature = "metrics")]
#[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^53")]
fn float(count: u64) -> f64 {
    count as f64
}
