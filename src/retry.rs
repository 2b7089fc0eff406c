//! Pauses between two tries.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::{
    duration::{capped, limit},
    error::StoreError,
};

/// Pauses that double from try to try, up to a maximum.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Backoff {
    first: Duration,
    max: Duration,
}

impl Backoff {
    pub(crate) const fn new(first: Duration, max: Duration) -> Self {
        Self { first, max }
    }

    /// Makes a backoff from settings of the application; panics if the pauses cannot grow.
    #[track_caller]
    pub(crate) fn checked(first: Duration, max: Duration) -> Self {
        assert!(first <= max, "pauses cannot grow from {first:?} to {max:?}: begin below the maximum");
        Self::new(limit("a first pause", first), capped(max))
    }

    pub(crate) fn first(self) -> Duration {
        self.first
    }

    /// The pause after this number of tries.
    pub(crate) fn after(self, tries: u32) -> Duration {
        let doubled = 2_u32.saturating_pow(tries.saturating_sub(1));
        self.first.saturating_mul(doubled).min(self.max)
    }

    /// The same pause with a jitter, so that nodes that failed together do not try again together.
    pub(crate) fn jittered_after(self, tries: u32) -> Duration {
        jittered(self.after(tries)).min(self.max)
    }
}

/// Tries a call of the store until it succeeds, or until the next try would begin after `give_up`.
///
/// `failed` is called with each error that is followed by another try.
pub(crate) async fn retry_until<T, F: Future<Output = Result<T, StoreError>>>(
    give_up: Instant,
    pauses: Backoff,
    mut work: impl FnMut() -> F,
    mut failed: impl FnMut(&StoreError),
) -> Result<T, StoreError> {
    let mut tries = 1;
    loop {
        let pause = pauses.after(tries);
        match work().await {
            Err(error) if Instant::now() + pause < give_up => failed(&error),
            // Success, or an error after which another try would begin too late.
            done => return done,
        }
        sleep(pause).await;
        tries += 1;
    }
}

/// Three to five quarters of the interval, so that nodes that started together do not act together.
pub(crate) fn jittered(interval: Duration) -> Duration {
    let random = Uuid::new_v4().as_bytes()[0];
    // Divided first: the longest interval must not overflow.
    (interval / 4 * 3).saturating_add(interval / 2 / 255 * u32::from(random))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_their_maximum() {
        let backoff = Backoff::new(Duration::from_secs(60), Duration::from_secs(3600));
        let pauses = [0, 1, 2, 3, 6, 7, 40, u32::MAX].map(|tries| backoff.after(tries).as_secs());
        assert_eq!(pauses, [60, 60, 120, 240, 1920, 3600, 3600, 3600]);
    }

    #[test]
    fn the_jitter_is_a_quarter_of_any_interval() {
        let minute = Duration::from_secs(60);
        for _ in 0..1000 {
            assert!((minute * 3 / 4..=minute * 5 / 4).contains(&jittered(minute)));
        }
        assert!(jittered(Duration::MAX) >= Duration::MAX / 4 * 3);
    }
}
