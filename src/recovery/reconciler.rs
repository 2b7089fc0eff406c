//! Finds out what became of dangling intents.

mod pass;

use std::{error::Error, fmt, sync::Arc, time::Duration};

use async_trait::async_trait;

pub use self::pass::ReconcilerPass;
use crate::{
    retry::Backoff,
    stored::intent::{Intent, Resource},
};

/// Asks upstream services what became of calls.
///
/// ```
/// # use tower_idempotency::{Intent, Lookup, Reconcile, Resource};
/// # #[derive(Debug)] struct Error;
/// # struct Bank;
/// # impl Bank {
/// #     async fn transfer_by_reference(&self, _: String) -> Result<Option<String>, std::io::Error> { Ok(None) }
/// # }
/// struct Upstreams {
///     bank: Bank,
/// }
///
/// #[async_trait::async_trait]
/// impl Reconcile for Upstreams {
///     async fn reconcile(&self, intent: &Intent) -> Result<Lookup, Box<dyn std::error::Error + Send + Sync>> {
///         Ok(match intent.name.as_str() {
///             "bank.transfer" => {
///                 match self.bank.transfer_by_reference(intent.upstream_key.to_string()).await? {
///                     Some(id) => Lookup::Found(Resource::new(id)),
///                     None => Lookup::NotFound,
///                 }
///             }
///             _ => Lookup::Unknown,
///         })
///     }
/// }
/// ```
///
/// The attribute is that of the crate `async-trait`. A closure that returns a future does it too:
/// `|intent: Intent| async move { Ok(Lookup::Unknown) }`.
#[async_trait]
pub trait Reconcile: Send + Sync + 'static {
    /// Looks one call up, by its [upstream key](Intent::upstream_key) or by what the upstream offers instead. It must not
    /// change anything, and not make the call again: that is the next attempt's.
    ///
    /// # Errors
    ///
    /// An error, a panic and a time-out count as [`Lookup::Unknown`], and are logged.
    async fn reconcile(&self, intent: &Intent) -> Result<Lookup, Box<dyn Error + Send + Sync>>;
}

#[async_trait]
impl<F, Fut> Reconcile for F
where
    F: Fn(Intent) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Lookup, Box<dyn Error + Send + Sync>>> + Send,
{
    async fn reconcile(&self, intent: &Intent) -> Result<Lookup, Box<dyn Error + Send + Sync>> {
        self(intent.clone()).await
    }
}

/// What an upstream service says of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "nothing else can be said of a call")]
pub enum Lookup {
    /// It has made this resource.
    Found(Resource),
    /// It has certainly not processed the call, and the call cannot still be under way to it.
    NotFound,
    /// It cannot tell at the moment.
    Unknown,
}

/// Looks up what became of dangling intents: those that are open past their grace period and whose attempt does not own
/// their record any more. Started with [`start_reconciler`](crate::IdempotencyHandle::start_reconciler).
///
/// | the look-up | what becomes of the intent |
/// |---|---|
/// | [`Found`](Lookup::Found) | finalized: the next attempt gets the resource, without a call |
/// | [`NotFound`](Lookup::NotFound) | looked up once more [after a pause](Self::with_confirmation_after); not found again: dead, and the next attempt calls again with the same upstream key |
/// | [`Unknown`](Lookup::Unknown), an error, a panic, a time-out | looked up again, after [longer and longer pauses](Self::with_backoff); after [so many look-ups](Self::with_max_lookups) it needs attention |
///
/// An intent whose call was certainly not sent is dead without a look-up. One that was not found is looked up a last time
/// [later](Self::with_recheck_after). If the resource has turned up by then the intent is finalized and needs attention,
/// because a retry in between may have made another one.
///
/// An intent that needs attention is never looked up again by itself: see
/// [`list_intents`](crate::IdempotencyHandle::list_intents) and
/// [`resolve_intent`](crate::IdempotencyHandle::resolve_intent).
///
/// Every node may run one: an intent is taken by one at a time. What one node had taken and not looked up when it died or
/// was drained is taken by another once the time for a whole batch is over, some 8 min with the defaults.
///
/// ```
/// # #[cfg(feature = "sqlite")] {
/// # use std::time::Duration;
/// use tower_idempotency::{Intent, Lookup, Reconciler};
///
/// let ask = |intent: Intent| async move { Ok(Lookup::Unknown) };
/// let reconciler = Reconciler::new(ask).with_timeout(Duration::from_secs(10));
/// # }
/// ```
#[derive(Clone)]
pub struct Reconciler {
    upstreams: Arc<dyn Reconcile>,
    settings: Settings,
}

#[derive(Clone, Debug)]
struct Settings {
    interval: Duration,
    batch: u32,
    concurrency: u32,
    timeout: Duration,
    confirm_after: Duration,
    backoff: Backoff,
    max_lookups: u32,
    recheck_after: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(30),
            batch: 100,
            concurrency: 8,
            timeout: Duration::from_secs(30),
            confirm_after: Duration::from_secs(60),
            backoff: Backoff::new(Duration::from_secs(30), Duration::from_secs(60 * 60)),
            max_lookups: 10,
            recheck_after: Duration::from_secs(60 * 60),
        }
    }
}

impl Reconciler {
    /// A reconciler that asks this.
    #[must_use]
    pub fn new(upstreams: impl Reconcile) -> Self {
        Self { upstreams: Arc::new(upstreams), settings: Settings::default() }
    }

    /// Sets the pause between two passes, with a jitter of a quarter; it doubles up to eight times while the store fails.
    /// Default: 30 s.
    ///
    /// # Panics
    ///
    /// If it is zero.
    #[must_use]
    #[track_caller]
    pub fn with_interval(mut self, interval: Duration) -> Self {
        assert!(
            !interval.is_zero(),
            "a reconciler needs a pause between two passes: use an interval above zero"
        );
        self.settings.interval = interval;
        self
    }

    /// Sets how many intents are taken at once. Default: 100.
    ///
    /// # Panics
    ///
    /// If it is zero.
    #[must_use]
    #[track_caller]
    pub fn with_batch(mut self, intents: u32) -> Self {
        assert!(intents > 0, "a reconciler with an empty batch takes nothing: use at least 1");
        self.settings.batch = intents;
        self
    }

    /// Sets how many look-ups run at once. Default: 8.
    ///
    /// # Panics
    ///
    /// If it is zero.
    #[must_use]
    #[track_caller]
    pub fn with_concurrency(mut self, lookups: u32) -> Self {
        assert!(lookups > 0, "a reconciler that runs no look-up at once settles nothing: use at least 1");
        self.settings.concurrency = lookups;
        self
    }

    /// Sets how long a look-up may take. Default: 30 s.
    ///
    /// # Panics
    ///
    /// If it is zero.
    #[must_use]
    #[track_caller]
    pub fn with_timeout(mut self, limit: Duration) -> Self {
        assert!(
            !limit.is_zero(),
            "a look-up that may take no time learns nothing: use a time-out above zero"
        );
        self.settings.timeout = limit;
        self
    }

    /// Sets after what time a call that was not found is looked up again, to be sure. It must be longer than the upstream
    /// takes to show what it has made. Default: 1 min.
    ///
    /// # Panics
    ///
    /// If it is zero.
    #[must_use]
    #[track_caller]
    pub fn with_confirmation_after(mut self, pause: Duration) -> Self {
        assert!(
            !pause.is_zero(),
            "a look-up at once confirms nothing: use a pause longer than the upstream takes to show what it has made"
        );
        self.settings.confirm_after = pause;
        self
    }

    /// Sets after what time a call is looked up again of which nothing was learned: `first`, and twice as long each time,
    /// but not longer than `max`; with a jitter of a quarter. Default: 30 s, and at most 1 h.
    ///
    /// # Panics
    ///
    /// If `first` is zero or longer than `max`.
    #[must_use]
    #[track_caller]
    pub fn with_backoff(mut self, first: Duration, max: Duration) -> Self {
        self.settings.backoff = Backoff::checked(first, max);
        self
    }

    /// Sets after how many look-ups without an answer an intent needs attention. Default: 10.
    ///
    /// # Panics
    ///
    /// If it is zero.
    #[must_use]
    #[track_caller]
    pub fn with_max_lookups(mut self, lookups: u32) -> Self {
        assert!(lookups > 0, "a reconciler with no look-ups learns nothing: use at least 1");
        self.settings.max_lookups = lookups;
        self
    }

    /// Sets after what time a call that was declared absent is looked up for the last time; zero: never. Default: 1 h.
    #[must_use]
    pub fn with_recheck_after(mut self, pause: Duration) -> Self {
        self.settings.recheck_after = pause;
        self
    }
}

impl Reconciler {
    pub(super) fn interval(&self) -> Duration {
        self.settings.interval
    }
}

impl fmt::Debug for Reconciler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reconciler").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl Settings {
    /// For how long nobody else may take a batch: until its last look-up has come to its time-out and is recorded.
    fn taken_for(&self) -> Duration {
        let rounds = self.batch.div_ceil(self.concurrency);
        self.timeout.saturating_mul(rounds.saturating_add(1)).saturating_add(TO_RECORD)
    }
}

/// How long it is tried to record a look-up.
const TO_RECORD: Duration = Duration::from_secs(15);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_taken_for_as_long_as_all_of_its_lookups_may_take() {
        let mut settings = Settings { timeout: Duration::from_secs(10), ..Settings::default() };
        let rounds = settings.batch.div_ceil(settings.concurrency);
        assert!(settings.taken_for() >= settings.timeout * rounds + TO_RECORD);
        settings.timeout = Duration::MAX;
        assert_eq!(settings.taken_for(), Duration::MAX);
    }
}
