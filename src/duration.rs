//! Durations that applications set.

use std::time::Duration;

/// A limit, a pause or an interval. Panics if it is shorter than a millisecond, which is never
/// meant: every call would be late, or a loop would not pause. `what` begins the message.
#[track_caller]
pub(crate) fn limit(what: &str, duration: Duration) -> Duration {
    assert!(duration >= SHORTEST, "{what} of {duration:?} is too short: use at least {SHORTEST:?}");
    capped(duration)
}

/// A duration of which a longer one than [`FOREVER`] counts as that: every clock can add it.
pub(crate) fn capped(duration: Duration) -> Duration {
    duration.min(FOREVER)
}

const SHORTEST: Duration = Duration::from_millis(1);
/// A hundred years: no limit.
pub(crate) const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);
